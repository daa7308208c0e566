"""Builds the page of `dino-jax COMMAND --help`. The meaning of a setting is the comment in its source code."""

import ast
import inspect
import io
import shutil
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from absl import flags

from dino_jax.commands.cli import Settings, usage_line
from dino_jax.provenance import flat

COLUMN = 44  # column at which meanings start
MOST = 120  # largest line width, characters


class Source(NamedTuple):
    """The source of a function: its syntax tree and its comments by line number."""

    tree: ast.Module
    inline: Mapping[int, str]  # comments after code
    above: Mapping[int, str]  # comments on their own line

    def comment(self, node: ast.stmt | ast.expr, end: int | None) -> str:
        """Returns the comment lines directly above a node, then the comment at its end."""
        first = node.lineno
        while first - 1 in self.above:
            first -= 1
        lines = [self.above[line] for line in range(first, node.lineno)]
        return " ".join([*lines, self.inline.get(end or node.lineno, "")]).strip()


def page(command: ModuleType, settings: Settings | None) -> str:
    """Returns the help of a command: usage, description, flags, and settings with their values and meanings."""
    parts = [f"usage: {usage_line(command)}", inspect.cleandoc(command.__doc__ or "")]
    if rows := [(_flag(flag), str(flag.help)) for flag in _flags_of(command)]:
        parts.append("flags:\n" + _table(rows))
    if settings:
        parts += [f"settings of {inspect.cleandoc(settings.about)}", *_groups(settings)]
    return "\n\n".join(parts)


def meanings(function: Callable[..., Any], seen: frozenset[Callable[..., Any]] = frozenset()) -> dict[str, str]:
    """Returns the meanings of the settings that a function defines: dotted name -> comment.

    The function defines settings by assignment (`config.optim.lr = 5e-4  # peak`) or as keys of a dict. A comment
    follows the value or is on the lines directly above. Functions of this package that it calls are
    also read, each once: `seen` are those already being read.
    """
    found: dict[str, str] = {}
    source = _read(function)
    for name in _called(source.tree):
        helper = getattr(function, "__globals__", {}).get(name)
        if isinstance(helper, FunctionType) and helper.__module__.startswith("dino_jax.") and helper not in seen:
            found |= meanings(helper, seen | {helper})
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            name = ast.unparse(node.targets[0]).partition(".")[2]
            found[name] = source.comment(node, node.end_lineno)
            found |= _entries(source, node.value, f"{name}.")
        elif isinstance(node, ast.Return | ast.Assign) and node.value:
            found |= _entries(source, node.value, "")
    return found


def _entries(source: Source, node: ast.expr, prefix: str) -> dict[str, str]:
    """Returns the settings in the dicts of an expression, including nested dicts."""
    found: dict[str, str] = {}
    for literal in _outer_dicts(node):
        for key, value in zip(literal.keys, literal.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                name = f"{prefix}{key.value}"
                nested = any(_outer_dicts(value))
                found[name] = source.comment(key, key.lineno if nested else value.end_lineno)
                found |= _entries(source, value, f"{name}.")
    return found


def _outer_dicts(node: ast.AST) -> Iterator[ast.Dict]:
    """Yields the dicts in an expression that are not inside another dict."""
    if isinstance(node, ast.Dict):
        yield node
    else:
        for child in ast.iter_child_nodes(node):
            yield from _outer_dicts(child)


def _read(function: Callable[..., Any]) -> Source:
    text = textwrap.dedent(inspect.getsource(function))
    lines = text.splitlines()
    inline: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            comments = inline if lines[line - 1][:column].strip() else above
            comments[line] = token.string.lstrip("# ")
    return Source(ast.parse(text), inline, above)


def _called(tree: ast.Module) -> Iterator[str]:
    """Yields the names of the functions that the code calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def _groups(settings: Settings) -> Iterator[str]:
    """Yields a table for each group of settings (config.optim, ...), starting with the ungrouped ones."""
    meaning: dict[str, str] = {}
    for function in settings.defined_in:  # the first one that defines a setting counts
        for name, text in meanings(function).items():
            meaning.setdefault(name, text)
    values = flat(settings.config.to_dict())
    groups: dict[str, list[tuple[str, str]]] = {"": []}
    for name in sorted(values, key=[*meaning, *values].index):  # in the order of the source code
        group = name.rpartition(".")[0]
        groups.setdefault(group, []).append((f"--config.{name}={_shown(values[name])}", meaning.get(name, "")))
    for group, rows in groups.items():
        title = f"{group}: {meaning[group]}" if meaning.get(group) else group
        if rows:
            yield f"{textwrap.fill(title, _width())}\n{_table(rows)}" if title else _table(rows)


def _flags_of(command: ModuleType) -> list[flags.Flag[Any]]:
    """Returns the flags that a command defines, without those of the libraries that it imports."""
    return flags.FLAGS.flags_by_module_dict().get(command.__name__, [])


def _flag(flag: flags.Flag[Any]) -> str:
    return f"--{flag.name}={_shown(flag.default)}"


def _shown(value: Any) -> str:
    """Formats a value as on the command line; "" if it is not set."""
    if value is None:
        return ""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(rows: list[tuple[str, str]]) -> str:
    """Formats names on the left and meanings on the right, or below the name if it is long."""
    lines: list[str] = []
    for name, meaning in rows:
        text = textwrap.wrap(meaning, _width() - COLUMN)
        first = f"  {name:<{COLUMN - 4}}  "
        if text and len(first) <= COLUMN:
            first += text.pop(0)
        lines += [first.rstrip(), *(" " * COLUMN + line for line in text)]
    return "\n".join(lines)


def _width() -> int:
    return max(min(shutil.get_terminal_size((MOST, 24)).columns, MOST), COLUMN + 30)
