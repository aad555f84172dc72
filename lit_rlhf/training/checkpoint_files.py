"""Training checkpoints on the disk: a new one replaces the old one only when it is complete, and damage is noticed."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_rlhf.errors import InputError, InputFileNotFoundError
from lit_rlhf.models.export import flush

PARTIAL = "partial-"
"""Prefix of files that are being written."""
REREADS = 10
"""How often a checkpoint is read that is replaced each time."""
_whole: set[tuple[int, ...]] = set()  # files of which every byte has been checked


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, flushed to the disk before they replace the previous one, and checked on reading.

    They are read as data: `weights_only` is True unless the caller of the Trainer chose False.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint next to `path`, flush it, and move it there.

        Raises:
            OSError: If it can't be written; the previous checkpoint is kept.
        """
        write_durably(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU, on all ranks; see `read_checkpoint`."""
        check_on_all_ranks(path)
        return read_checkpoint(Path(path), weights_only=weights_only is not False)


class ErrorHolder:
    """A file for `torch.save` that keeps its first error: torch's own writer may end the process where one is raised.

    Attributes:
        error: What the disk has raised; nothing is written after it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write data, unless an earlier part could not be written."""
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def tell(self) -> int:
        """Return the position in the file."""
        return self.file.tell()

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self.file.fileno()

    def flush(self) -> None:
        """Do nothing: the file itself is flushed once all is written."""

    def close(self) -> None:
        """Do nothing, as in `flush`."""


def write_durably(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a file next to `path`, flush it to the disk, then replace `path` by it.

    Raises:
        OSError: If the file can't be written.
    """
    partial = path.with_name(PARTIAL + path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            held = ErrorHolder(file)
            write(held)  # type: ignore[arg-type]
            if held.error is not None:
                raise held.error
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def read_checkpoint(path: Path, weights_only: bool = True, mmap: bool = False) -> dict[str, Any]:
    """Read a training checkpoint onto the CPU, without tensors that are in a folder of shards.

    A file that a run replaces in the meantime is read again: it is opened more than once.

    Args:
        path: The file.
        weights_only: Refuse anything but tensors and plain data.
        mmap: Map the tensors instead of reading them, and skip the check of every byte: for a first look.

    Raises:
        ValueError: If the file is missing, damaged, or not a training checkpoint.
    """
    for _ in range(REREADS):
        version = _version(path)
        try:
            checkpoint = _read(path, weights_only, mmap)
        except InputError:
            if _version(path) == version:
                raise
        else:
            if _version(path) == version:
                return checkpoint
    raise InputError(f"the checkpoint {str(path)!r} is replaced faster than it can be read: copy it first")


def _read(path: Path, weights_only: bool, mmap: bool) -> dict[str, Any]:
    check_file(path, every_byte=not mmap)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"the checkpoint {str(path)!r} holds more than tensors and plain data, which could run commands, so it is "
            "not read"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(_damaged(path)) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "global_step", "epoch"} <= checkpoint.keys():
        raise InputError(f"{str(path)!r} is not a training checkpoint: give the .ckpt of a `fit`")
    return checkpoint


def check_file(path: Path, every_byte: bool = True) -> None:
    """Check that a checkpoint is a complete file, by the checksums that it holds. Every byte is read only once.

    Raises:
        ValueError: If it is missing, a folder, empty, truncated or altered.
    """
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder, not a checkpoint")
    if not path.is_file():
        raise InputFileNotFoundError(f"there is no checkpoint {str(path)!r}")
    version = _version(path)  # before it is opened: a file that replaces it then is not taken for a checked one
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
        damaged = empty
        if not empty:
            with zipfile.ZipFile(path) as archive:
                # torch writes no attributes; one that marks an entry as a folder would leave its tensor uninitialized
                damaged = any(entry.external_attr for entry in archive.infolist())
                if every_byte and version not in _whole:
                    damaged |= archive.testzip() is not None
                    _whole.update([] if damaged else [version])
    except PermissionError as error:
        raise InputError(f"the checkpoint {str(path)!r} can't be read: {error.strerror}") from error
    except Exception as error:  # what a damaged archive raises depends on the byte
        raise InputError(_damaged(path)) from error
    if damaged:
        raise InputError(_damaged(path) if not empty else f"the checkpoint {str(path)!r} is an empty file")


def check_on_all_ranks(path: str | Path | None) -> None:
    """Check that all ranks read the same checkpoint: machines without a common disk may lack it. Call it on all ranks.

    Raises:
        ValueError: On every rank, if one finds no checkpoint, or another one.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    own = str(path) if path is not None and Path(path).is_file() else None
    torch.distributed.all_gather_object(ranks, (own, socket.gethostname()))
    first = next((found for found, _ in ranks if found is not None), None)
    for rank, (found, host) in enumerate(ranks):
        if found != first:
            raise InputFileNotFoundError(
                f"--ckpt_path: process {rank}, on the machine {host!r}, does not find the checkpoint {first!r} of the "
                "others: copy it there, or write to a disk that all machines share"
            )


def _version(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written to or replaced; empty if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime_ns


def _damaged(path: Path) -> str:
    return (
        f"{str(path)!r} is not a checkpoint, or a damaged one (truncated or altered): resume from another one, or copy "
        "it again"
    )
