"""The checksums of a checkpoint are computed once, and again after a change."""

import threading
import time
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


def test_a_checkpoint_that_is_replaced_meanwhile_is_read_whole(tmp_path, monkeypatch):
    """Its tensors are mapped from a file that is opened anew: not from another one than its structure."""
    path = tmp_path / "last.ckpt"
    contents = [
        {"state_dict": {"w": torch.full((size,), float(size))}, "global_step": size, "epoch": 0, "export": {}}
        for size in (500, 300)
    ]
    CheckpointFiles().save_checkpoint(contents[0], path)
    load, replaced = torch.load, []

    def load_while_it_is_replaced(*args, **kwargs):
        from_file = torch.UntypedStorage.from_file

        def late(*args):
            if not replaced:
                replaced.append(True)
                CheckpointFiles().save_checkpoint(contents[1], path)
            return from_file(*args)

        with monkeypatch.context() as patch:
            patch.setattr(torch.UntypedStorage, "from_file", late)
            return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load_while_it_is_replaced)
    found = read_checkpoint(path, mmap=True)
    assert replaced and found["global_step"] == 300
    assert found["state_dict"]["w"].tolist() == [300.0] * 300


def test_a_checkpoint_can_be_read_while_a_run_replaces_it(tmp_path):
    path, stop = tmp_path / "last.ckpt", threading.Event()

    def write():
        for size in 40 * [300, 900]:
            content = {"state_dict": {"w": torch.full((size,), float(size))}, "global_step": size, "epoch": 0}
            CheckpointFiles().save_checkpoint(content, path)
            time.sleep(0.03)  # no run saves so often that nobody can read
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    count = 0
    while not path.exists():
        pass
    while not stop.is_set():
        found = read_checkpoint(path, mmap=True)
        assert found["state_dict"]["w"].tolist() == found["global_step"] * [float(found["global_step"])]
        count += 1
    writer.join()
    assert count > 10
