"""The checksums of a checkpoint are computed once, and again after a change."""

import zipfile

import pytest
import torch

from lit_rlhf.cli.checkpoints import resolve_checkpoint
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


@pytest.mark.parametrize("size", [500, 300])
def test_a_checkpoint_that_is_replaced_meanwhile_is_read_whole(size, tmp_path, monkeypatch):
    """Its tensors are mapped from a file that is opened anew: not from another one than its structure."""
    path, from_file, replaced = tmp_path / "last.ckpt", torch.UntypedStorage.from_file, []

    def save(step, size):
        content = {"state_dict": {"w": torch.full((size,), float(step))}, "global_step": step, "epoch": 0}
        CheckpointFiles().save_checkpoint(content, path)

    def map_the_next(*args):
        if not replaced:
            replaced.append(save(2, size))
        return from_file(*args)

    save(1, 500)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", map_the_next)
    found = read_checkpoint(path, mmap=True)
    assert replaced and found["global_step"] == 2
    assert found["state_dict"]["w"].tolist() == size * [2.0]
