"""Checkpoints of which each rank writes its shards: the tensors into a folder, everything else into a file beside it.

A new checkpoint is written into another folder than the one that the file names, and counts once a new file has
replaced the old one; so neither is ever half-written.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from lit_rlhf.errors import InputError
from lit_rlhf.models.export import flush
from lit_rlhf.models.sharding import Sharding
from lit_rlhf.models.shards import SHARDS, checksum, slots
from lit_rlhf.training.checkpoint_files import ErrorHolder, read_checkpoint


def write_shards(checkpoint: dict[str, Any], path: Path, sharding: Sharding) -> None:
    """Write the tensors of a checkpoint into a folder beside its file. Call it on all ranks.

    Args:
        checkpoint: The checkpoint; tensors without storage take the place of those that are written.
        path: The file, which is not written.
        sharding: The ranks.

    Raises:
        OSError: On all ranks, if one can't write its shards.
    """
    if sharding.is_first:
        names = [f"{path.name}.{SHARDS}-{i}" for i in range(2)]
        checkpoint[SHARDS] = {"folder": next(name for name in names if name != named_folder(path))}
        shutil.rmtree(path.with_name(checkpoint[SHARDS]["folder"]), ignore_errors=True)
    folder = path.with_name(sharding.from_first(checkpoint.get(SHARDS, {}).get("folder")))
    saved = list(slots(checkpoint))
    writer = FileSystemWriter(folder)
    writer.fs = _Files()
    try:
        save({name: values[key] for name, values, key in saved}, storage_writer=writer)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
        if not causes:
            raise RuntimeError(f"the shards of {str(path)!r} could not be written") from error
        failed = OSError(causes[0].errno, causes[0].strerror)
        failed.on_all_ranks = True  # type: ignore[attr-defined]
        raise failed from error
    files = sorted(file.name for file in folder.iterdir())
    ranks, rank = sharding.mesh.size(), sharding.mesh.get_local_rank()
    sums: list[Any] = [None] * ranks
    own = {name: checksum(folder / name) for name in files[rank::ranks]}
    torch.distributed.all_gather_object(sums, own, group=sharding.mesh.get_group())
    checkpoint[SHARDS] = {"folder": folder.name, "files": {name: sums[i % ranks][name] for i, name in enumerate(files)}}
    if sharding.is_first:
        flush(folder)
    for _, values, key in saved:
        values[key] = torch.empty(values[key].shape, dtype=values[key].dtype, device="meta")


def named_folder(path: Path) -> str:
    """Return the name of the folder that holds the tensors of a checkpoint; empty if there is none."""
    try:
        return str(read_checkpoint(path, mmap=True).get(SHARDS, {}).get("folder", ""))
    except InputError:
        return ""


def remove_unnamed(path: Path) -> None:
    """Remove the folders of a checkpoint's earlier or failed versions."""
    named = named_folder(path)
    for folder in path.parent.glob(f"{path.name}.{SHARDS}-?"):
        if folder.name != named:
            shutil.rmtree(folder, ignore_errors=True)


class _Files(FileSystem):
    """Files that raise the disk's error only after torch has written into them."""

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as file:
            if mode != "wb":
                yield file
                return
            held = ErrorHolder(cast("Any", file))
            yield cast("io.IOBase", held)
            if held.error is not None:
                raise held.error
