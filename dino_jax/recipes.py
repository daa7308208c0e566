"""Recipes: the files of configs/, found by name, and files of your own, found by path.

A recipe is a Python file with a `get_config()` that returns a ConfigDict. A recipe that changes another one starts from
`recipes.get_config(NAME)`, so it works from any folder:

    from dino_jax import recipes

    def get_config():
        config = recipes.get_config("vits16")
        config.optim.lr = 1e-3
        return config
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from dino_jax.errors import UserError

_HERE = Path(__file__).parent
# An installed wheel has the recipes inside the package, a checkout beside it.
FOLDER = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"


def get_config(recipe: str = "default") -> ConfigDict:
    """Returns the config of a recipe.

    Args:
        recipe: a name, such as "vits16", or the path of a Python file.

    Raises:
        UserError: there is no such recipe, or its file fails.
    """
    return config_of(load(recipe))


def names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def find(recipe: str) -> Path:
    """Returns the file of a recipe, given its name or path. Raises UserError if there is none."""
    path = Path(recipe) if recipe.endswith(".py") else FOLDER / f"{recipe}.py"
    if not path.is_file() or path.stem == "__init__":
        raise UserError(f"no recipe {recipe!r}: give the path of a .py file, or one of {', '.join(names())}")
    return path.resolve()


def load(recipe: str) -> ModuleType:
    """Runs the file of a recipe, given its name or path, and returns its module. Raises UserError as `get_config`."""
    path = find(recipe)
    spec = spec_from_file_location(f"dino_jax.configs.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with _mistakes_in(path):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path} has no get_config(): define one that returns a ConfigDict")
    return module


def config_of(recipe: ModuleType) -> ConfigDict:
    """Returns the config of a recipe that `load` returned. Raises UserError as `get_config`."""
    path = Path(str(recipe.__file__))
    with _mistakes_in(path):
        config = recipe.get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returns {type(config).__name__}: return a ConfigDict")
    return config


@contextmanager
def _mistakes_in(path: Path) -> Iterator[None]:
    """Turns what a recipe's file raises into a UserError that names the line."""
    try:
        yield
    except (UserError, ModuleNotFoundError):  # these name their way out
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = path if line is None else f"{path}:{line}"
        raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
