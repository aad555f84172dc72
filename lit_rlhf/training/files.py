"""The folder of a run: below `default_root_dir`, claimed by one run alone, and locked while its process lives."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakKeyDictionary, finalize

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlhf.errors import InputError
from lit_rlhf.training.checkpoint_files import PARTIAL

try:
    import fcntl
except ImportError:  # Windows has no advisory locks: no leftovers are removed there
    fcntl = None  # type: ignore[assignment]

_folders: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()  # that all ranks agreed on
_claimed: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()  # of the first rank
_held: dict[Path, int] = {}  # descriptors of the folders that this process claimed: they hold the locks


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of this run. Call it on all ranks.

    It is the one that `claim_run_folder` chose, or that of a TensorBoard or CSV logger below `default_root_dir`, or
    else `version_N` there. Outside `fit`, without a claimed folder or such a logger, it is `default_root_dir`.
    """
    if trainer not in _folders:
        path: Path = trainer.strategy.broadcast(_choose(trainer) if trainer.is_global_zero else Path())
        if not _writes(trainer):
            return path
        _folders[trainer] = path
    return _folders[trainer]


def claim_run_folder(trainer: Trainer, kind: str) -> Path:
    """Create the folder of this run, such as `version_3` for the kind `version`. Call it on the first rank only.

    Raises:
        ValueError: If it can't be created.
    """
    if re.match(r"\w+:/", str(trainer.default_root_dir)):
        raise InputError(
            f"default_root_dir {str(trainer.default_root_dir)!r} is no folder of a file system: mount it, or give a "
            "folder and copy it afterwards"
        )
    _claimed[trainer] = path = claim_folder(Path(trainer.default_root_dir), kind)
    finalize(trainer, _release, path)
    return path


def claim_folder(root: Path, kind: str = "version") -> Path:
    """Create the next folder `KIND_N` below `root`; of runs that start at the same time, each gets its own.

    What killed runs left half written below `root` is removed.

    Raises:
        ValueError: If it can't be created.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        numbers = [int(match[1]) for path in root.iterdir() if (match := re.fullmatch(rf"{kind}_(\d+)", path.name))]
        number = max(numbers, default=-1) + 1
        while True:
            path = root / f"{kind}_{number}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
            number += 1
    except OSError as error:
        raise InputError(
            f"default_root_dir {str(root)!r} can't be written to ({error.strerror}): give another --trainer."
            "default_root_dir"
        ) from error
    _hold(path)
    return path


def is_removed(path: Path) -> bool:
    """Return whether a folder that this process claimed has been removed, moved or replaced."""
    if path not in _held:
        return False
    claimed = os.fstat(_held[path])
    try:
        found = path.stat()
    except OSError:
        return True
    return (found.st_dev, found.st_ino) != (claimed.st_dev, claimed.st_ino)


def release_if_empty(path: Path) -> None:
    """Remove the folder of a run that has written nothing into it, if this process claimed it."""
    with contextlib.suppress(OSError):
        if path in _held:
            path.rmdir()
            _release(path)


def remove_leftovers(root: Path) -> None:
    """Remove what killed runs left half written below `root`; nothing of a run that is still alive."""
    alive = False
    for folder in root.glob("version_*"):
        with _lock(folder) as free:
            alive |= not free
            if free:
                for partial in (*folder.glob(f"{PARTIAL}*"), *folder.glob(f"checkpoints/{PARTIAL}*")):
                    partial.unlink(missing_ok=True)
                _finish_exports(folder / "policy")
    if not alive:
        _finish_exports(root / "policy")


def _finish_exports(folder: Path) -> None:
    """Remove half-written policies; a complete one that had not yet replaced the old one takes its place."""
    for name in ("best", "last"):
        for scratch in folder.glob(f".{name}-*"):
            if not (folder / name).exists() and (scratch / "old").is_dir():
                os.replace(scratch / "new", folder / name)
            shutil.rmtree(scratch, ignore_errors=True)


def _choose(trainer: Trainer) -> Path:
    root = Path(trainer.default_root_dir)
    if trainer in _claimed:
        return _claimed[trainer]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger | CSVLogger):
            path = Path(logger.log_dir)
            if path.resolve().is_relative_to(root.resolve()):
                return path
    return claim_run_folder(trainer, "version") if _writes(trainer) else root


def _writes(trainer: Trainer) -> bool:
    """Return whether this is a run that needs a folder: training, and no `fast_dev_run`."""
    return trainer.state.fn == TrainerFn.FITTING and not getattr(trainer, "fast_dev_run", False)


def _hold(path: Path) -> None:
    with contextlib.suppress(OSError):
        _held[path] = os.open(path, os.O_RDONLY)
        if fcntl is not None:
            fcntl.flock(_held[path], fcntl.LOCK_SH)


def _release(path: Path) -> None:
    if path in _held:
        os.close(_held.pop(path))


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Yield whether no other process holds the folder; where that can't be known, it counts as held."""
    free, descriptor = False, -1
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
    try:
        yield free
    finally:
        if descriptor >= 0:
            os.close(descriptor)
