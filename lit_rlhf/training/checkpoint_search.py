"""The checkpoints `last` and `best` of the runs below a root, for the command line and for a Trainer's `ckpt_path`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_rlhf.errors import InputError, InputFileNotFoundError, counted
from lit_rlhf.models.shards import check_shards
from lit_rlhf.training.checkpoint_files import PARTIAL, check_file, read_checkpoint

PLACES = ("version_*/checkpoints", "lightning_logs/version_*/checkpoints", "checkpoints")
"""Folders below `default_root_dir` with checkpoints, of the command line and of Trainers in Python."""


def find_checkpoint(given: str, root: Path, may_be_missing: bool = False) -> Path | None:
    """Return the checkpoint `last` or `best` below `root`, after a check that it is whole.

    `last` is the one saved last, by the time that it holds; damaged ones are skipped with a warning. `best` is the same
    file if it holds the best policy.

    Args:
        given: `last` or `best`.
        root: The runs' `default_root_dir`.
        may_be_missing: Return None if `last` is given and there is no checkpoint yet, so that a first run and its
            restarts can be the same command.

    Raises:
        ValueError: If there is no such checkpoint, or all are damaged.
    """
    newest, content = _newest(given, root)
    if newest is None:
        if may_be_missing and given == "last":
            rank_zero_info(f"--ckpt_path last: there is no checkpoint in {str(root)!r} yet, so training starts anew")
            return None
        raise InputFileNotFoundError(f"--ckpt_path {given}: there is no checkpoint in {str(root)!r}")
    if given == "best":
        _check_best(content, newest)
    rank_zero_info(f"--ckpt_path {given}: {newest}, saved after {counted(content['global_step'], 'update')}")
    return newest


def candidates(root: Path) -> Iterable[Path]:
    """Return the complete checkpoint files below `root`, whole or not."""
    for place in PLACES:
        for path in sorted(root.glob(f"{place}/*.ckpt")):
            if not path.name.startswith(PARTIAL):
                yield path


def search_by_name(trainer: Trainer | None) -> None:
    """Let a Trainer find `ckpt_path="last"` and `"best"` as the command line does.

    Lightning asks only its own callbacks; without a checkpoint of theirs, it would start `last` anew.
    """
    connector = getattr(trainer, "_checkpoint_connector", None)
    if connector is not None and not isinstance(connector._parse_ckpt_path, partial):
        connector._parse_ckpt_path = partial(_parse_ckpt_path, connector)


def _parse_ckpt_path(connector: Any, state_fn: TrainerFn, ckpt_path: Any, **options: Any) -> Any:
    trainer: Trainer = connector.trainer
    lightning = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if ckpt_path == "last":
        after_errors = [c for c in trainer.callbacks if isinstance(c, OnExceptionCheckpoint)]  # type: ignore[attr-defined]
        known = any(callback._find_last_checkpoints(trainer) for callback in lightning)
        known |= any(Path(callback.ckpt_path).is_file() for callback in after_errors)
    else:
        known = ckpt_path != "best" or bool(lightning)
    if known:
        return type(connector)._parse_ckpt_path(connector, state_fn, ckpt_path, **options)
    return find_checkpoint(ckpt_path, Path(trainer.default_root_dir), may_be_missing=state_fn == TrainerFn.FITTING)


def _newest(given: str, root: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the whole checkpoint below `root` that was saved last, and its content.

    Raises:
        ValueError: If there are checkpoints, all of them damaged.
    """
    found, damaged = [], []
    for path in candidates(root):
        try:
            content = read_checkpoint(path, mmap=True)
            found.append((content.get("saved_at", path.stat().st_mtime), content["global_step"], path, content))
        except InputError as error:
            damaged.append(str(error))
    for _, _, path, content in sorted(found, key=lambda item: item[:2], reverse=True):
        try:
            check_file(path)
            check_shards(content, path)
        except InputError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            rank_zero_warn(f"--ckpt_path {given}: skipped, {reason}")
        return path, content
    if damaged:
        raise InputError(f"--ckpt_path {given}: no checkpoint in {str(root)!r} is whole: {damaged[0]}")
    return None, {}


def _check_best(content: dict[str, Any], path: Path) -> None:
    """Check that the newest checkpoint holds the best policy: of others only the policy is kept."""
    states = [state for name, state in content.get("callbacks", {}).items() if name.startswith("PolicyCheckpoint")]
    best = states[0] if states else {}
    if not best.get("best_path"):
        raise InputError(f"--ckpt_path best: the run of {str(path)!r} validated no policy: give `last` or a file")
    if best["best_step"] != content["global_step"]:
        raise InputError(
            f"--ckpt_path best: of update {best['best_step']}, the best, only the policy is kept: give --model.policy "
            f"{best['best_path']}, or --ckpt_path last for update {content['global_step']}"
        )
