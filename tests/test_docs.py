"""The documents name tests that exist: each `pytest` command in them selects at least one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    {
        command
        for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
        for command in re.findall(r"`pytest ([^`]+)`", page.read_text(encoding="utf-8"))
    }
)


def test_there_are_such_commands():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_the_documents_selects_tests(command):
    files, _, words = command.partition(" -k ")
    names = [name for file in files.split() for name in re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.M)]
    assert names
    for word in filter(None, words.strip('"').split(" or ")):
        assert any(word in name for name in names), f"no test of {files} has {word!r} in its name"
