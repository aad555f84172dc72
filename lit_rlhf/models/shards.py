"""The tensors of a checkpoint in a folder beside it, as `torch.distributed.checkpoint` writes them.

The checkpoint itself stays a file. In it, tensors without storage (on the meta device) are in place of those in the
folder, and it names the folder with the size and the checksum of each of its files.
"""

from __future__ import annotations

import pickle
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from lit_rlhf.errors import InputError, InputFileNotFoundError

SHARDS = "shards"
"""Key of a checkpoint under which it names the folder and its files."""
PARTS = ("state_dict", "optimizer_states")
"""Parts of a checkpoint whose tensors are in the folder."""
OF_INDEX = (
    metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.TensorProperties,
    metadata.TensorStorageMetadata, metadata.ChunkStorageMetadata, metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo, torch.Size,
)  # fmt: skip
INDEX = {(part.__module__, part.__name__): part for part in OF_INDEX} | {
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # type: ignore[attr-defined]
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
}
"""What the index of a folder is made of, besides dtypes, by module and name."""
_whole: set[tuple[Any, ...]] = set()  # files of which every byte has been checked


def slots(checkpoint: Mapping[str, Any], parts: Sequence[str] = PARTS) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """Yield each tensor of a checkpoint that a folder may hold: its name there, the dict that it is in, and its key."""
    if "state_dict" in parts:
        for name in checkpoint["state_dict"]:
            yield f"state_dict/{name}", checkpoint["state_dict"], name
    if "optimizer_states" in parts:
        for i, state in enumerate(checkpoint.get("optimizer_states", ())):
            for key, values in state["state"].items():
                for name in [n for n, value in values.items() if isinstance(value, Tensor)]:
                    yield f"optimizer_states/{i}/{key}/{name}", values, name


def fill(checkpoint: dict[str, Any], path: Path, parts: Sequence[str] = PARTS) -> None:
    """Read the tensors that a checkpoint lacks from the folder beside it, whole, without other ranks.

    Args:
        checkpoint: What the file holds; changed in place. One that has no folder is left as it is.
        path: The file.
        parts: Parts to read.

    Raises:
        ValueError: If the folder is missing or damaged.
    """
    if SHARDS not in checkpoint:
        return
    check_shards(checkpoint, path)
    missing = list(slots(checkpoint, parts))
    tensors = {name: torch.empty(values[key].shape, dtype=values[key].dtype) for name, values, key in missing}
    with warnings.catch_warnings(action="ignore"):  # of a single process
        read_shards(tensors, folder_of(checkpoint, path), alone=True)
    for name, values, key in missing:
        values[key] = tensors[name]


def read_shards(tensors: dict[str, Tensor], folder: Path, alone: bool = False) -> None:
    """Read this rank's shards of some tensors, in place. Call it on all ranks, unless the tensors are whole.

    Raises:
        ValueError: On all ranks, if one can't read its shards.
    """
    try:
        load(tensors, storage_reader=_Reader(folder), no_dist=alone)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise InputError(f"the shards in {str(folder)!r} can't be read: {cause}") from error


def folder_of(checkpoint: Mapping[str, Any], path: Path) -> Path:
    """Return the folder that a checkpoint names."""
    return path.with_name(Path(checkpoint[SHARDS]["folder"]).name)


def checksum(path: Path) -> list[int]:
    """Return the size and the CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while data := file.read(2**24):
            size, crc = size + len(data), zlib.crc32(data, crc)
    return [size, crc]


def check_shards(checkpoint: Mapping[str, Any], path: Path, every_byte: bool = True) -> None:
    """Check that the folder of a checkpoint is complete, if it has one. Every byte is read only once.

    Raises:
        ValueError: If a file is missing, truncated or altered.
    """
    if SHARDS not in checkpoint:
        return
    folder = folder_of(checkpoint, path)
    for name, (size, crc) in checkpoint[SHARDS]["files"].items():
        file = folder / Path(name).name
        if not file.is_file():
            raise InputFileNotFoundError(
                f"the checkpoint {str(path)!r} has its weights in {str(folder)!r}, where the file {file.name!r} is "
                "missing: copy the folder, too"
            )
        stat = file.stat()
        version = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime_ns, size, crc)
        damaged = stat.st_size != size
        if every_byte and not damaged and version not in _whole:
            damaged = checksum(file) != [size, crc]
            _whole.update([] if damaged else [version])
        if damaged:
            raise InputError(
                f"{str(file)!r}, a part of the checkpoint {str(path)!r}, is damaged (truncated or altered): resume "
                "from another one, or copy the folder again"
            )


class _Reader(filesystem.FileSystemReader):
    """Reads the index of a folder as plain data: it is pickled, which could run commands."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            index: metadata.Metadata = _Unpickler(file).load()
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


class _Unpickler(pickle.Unpickler):
    """Builds only what an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        value: Any = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        if (found := INDEX.get((module, name))) is None:
            raise pickle.UnpicklingError(f"the index of a checkpoint holds {module}.{name}, which could run commands")
        return found
