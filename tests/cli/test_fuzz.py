"""Random mistakes on the command line end in at most three lines and never in a traceback."""

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

from commands import FAST, SHORT
from lit_rlhf.cli import main
from mistakes import Line, lines

COMMON = [
    "fit", "--config=rloo", "--model.policy=tiny", "--data.train=prompts.jsonl", "--data.val=4",
    "--model.rewards+=mine.words", "--trainer.default_root_dir=here",
]  # fmt: skip
PYTHON = re.compile(r"Traceback|Namespace\(|NestedArg|typing\.|collections\.abc|<class |Parser key|Errors:")
"""What a user need not read."""


class Accepted(Exception):
    """The command line was accepted."""


def accept(*args, **kwargs):
    raise Accepted


def fault(line: Line, capsys) -> str:
    """Return what is wrong with the outcome of a command line, or nothing."""
    for name, content in line.files.items():
        if content is None:
            Path(name).mkdir()
        else:
            Path(name).write_bytes(content)
    argv = list(sys.argv)
    capsys.readouterr()
    try:
        main([*COMMON, *SHORT, *FAST, *line.args])
        outcome: object = "returned"
    except Accepted:
        return f"accepted, without {line.expected!r}" if line.expected else ""
    except SystemExit as stopped:
        outcome = stopped.code
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    finally:
        sys.argv[:] = argv
        for name, content in line.files.items():
            shutil.rmtree(name) if content is None else Path(name).unlink()
    message = [row for row in capsys.readouterr().err.splitlines() if row.startswith(("lit-rlhf", "`"))]
    if outcome == 0:
        return ""
    faults = {
        f"the outcome is {outcome}": outcome not in (1, 2),
        "no sentence": not message or not message[0].removeprefix("lit-rlhf:").strip(),
        f"{len(message)} lines": len(message) > 3,
        "a long line": any(len(row) > 400 for row in message),
        "Python's words": any(PYTHON.search(row) for row in message),
        f"no {line.expected!r}": line.expected not in "".join(message),
    }
    found = [name for name, wrong in faults.items() if wrong]
    return f"{', '.join(found)}: {message}" if found else ""


def check(seed: int, count: int, capsys) -> None:
    faults = {str(line): found for line in lines(seed, count) if (found := fault(line, capsys))}
    assert not faults, "\n".join(f"{line}\n    {found}" for line, found in faults.items())


@pytest.fixture
def parsing_only(monkeypatch):
    """Let each command end where the parser has accepted its arguments."""
    monkeypatch.setattr(importlib.import_module("lit_rlhf.cli.main").RLHFCommandLine, "instantiate_classes", accept)


@pytest.fixture
def building_only(monkeypatch):
    """Let each command end where its objects are built."""
    monkeypatch.setattr(importlib.import_module("lit_rlhf.cli.main").RLHFCommandLine, "_run_subcommand", accept)


def test_mistakes_in_arguments(workspace, parsing_only, capsys):
    check(seed=0, count=18, capsys=capsys)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_mistakes_in_arguments(workspace, parsing_only, capsys):
    check(seed=1, count=216, capsys=capsys)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
def test_many_mistakes_until_the_objects_are_built(workspace, building_only, capsys):
    check(seed=2, count=216, capsys=capsys)
