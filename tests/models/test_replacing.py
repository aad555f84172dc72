"""A model's folder is replaced by a complete one that is on the disk, or stays."""

import os
from pathlib import Path

import pytest

from lit_rlhf.models.export import write_folder


def write(text):
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_between_the_renames_keeps_the_old_folder(failing, error, tmp_path, monkeypatch):
    write_folder(tmp_path / "best", write("old"))
    rename, calls = Path.rename, []

    def failing_rename(path, target):
        calls.append(path)
        if len(calls) == failing:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(type(error)):
        write_folder(tmp_path / "best", write("new"))
    assert (tmp_path / "best" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_every_file_is_on_the_disk_before_the_folder_is_replaced(tmp_path, monkeypatch):
    fsync, replaced_before = os.fsync, {}

    def record(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        replaced_before[path.name] = (tmp_path / "best").exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write_folder(tmp_path / "best", write("new"))
    assert replaced_before == {"config.json": False, "lit_rlhf.json": False, "new": False, tmp_path.name: True}
