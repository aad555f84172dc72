import sys
from pathlib import Path

import pytest

from commands import write_workspace


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """Make a working directory with a tiny model, data of every kind, and a user's module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setitem(sys.modules, "mine", None)
    sys.modules.pop("mine")
    write_workspace(tmp_path)
    return tmp_path
