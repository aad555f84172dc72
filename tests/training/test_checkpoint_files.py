"""The checksums of a checkpoint are computed once, and again after a change."""

import itertools
import zipfile

import pytest
import torch

from lit_rlhf.cli.checkpoints import resolve_checkpoint
from lit_rlhf.errors import InputError
from lit_rlhf.training.checkpoint_files import CheckpointFiles, read_checkpoint


def test_a_resume_reads_every_byte_once_and_again_after_a_change(tmp_path, monkeypatch):
    testzip, calls = zipfile.ZipFile.testzip, []
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: calls.append(archive) or testzip(archive))
    path = tmp_path / "version_0/checkpoints/last.ckpt"
    content = {"state_dict": {"w": torch.ones(500)}, "global_step": 3, "epoch": 0, "export": {}}
    CheckpointFiles().save_checkpoint(content, path)
    assert resolve_checkpoint("last", tmp_path) == resolve_checkpoint(str(path), tmp_path) == path
    assert CheckpointFiles().load_checkpoint(path)["global_step"] == 3 and len(calls) == 1
    CheckpointFiles().save_checkpoint({**content, "global_step": 4}, path)
    assert read_checkpoint(path)["global_step"] == 4 and len(calls) == 2
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"\x00\x00\x80\x3f" * 9) + 400] ^= 1
    path.write_bytes(damaged)
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(path)


@pytest.fixture
def replaced(tmp_path, monkeypatch):
    """Return a function that makes a checkpoint which is replaced each time it is mapped, up to a number of times."""
    path, from_file = tmp_path / "last.ckpt", torch.UntypedStorage.from_file

    def make(size, times):
        steps = iter(range(2, 2 + times))

        def save(step, size):
            content = {"state_dict": {"w": torch.full((size,), float(step))}, "global_step": step, "epoch": 0}
            CheckpointFiles().save_checkpoint(content, path)

        def map_the_next(*args):
            for step in itertools.islice(steps, 1):
                save(step, size)
            return from_file(*args)

        save(1, 500)
        monkeypatch.setattr(torch.UntypedStorage, "from_file", map_the_next)
        return path

    return make


@pytest.mark.parametrize("size", [500, 300])
def test_a_checkpoint_that_is_replaced_meanwhile_is_read_whole(size, replaced):
    """Its tensors are mapped from a file that is opened anew: not from another one than its structure."""
    found = read_checkpoint(replaced(size, times=2), mmap=True)
    assert found["global_step"] == 3
    assert found["state_dict"]["w"].tolist() == size * [3.0]


def test_a_checkpoint_that_is_replaced_each_time_is_one_sentence(replaced):
    with pytest.raises(InputError, match="is replaced faster than it can be read: copy it first"):
        read_checkpoint(replaced(300, times=100), mmap=True)
