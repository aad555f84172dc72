"""What `--ckpt_path` may name: a checkpoint, or `last` and `best` of the runs below a root."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_rlhf.errors import InputError, InputFileNotFoundError
from lit_rlhf.models.export import export_checkpoint
from lit_rlhf.training.checkpoint_files import PARTIAL, check_file, read_checkpoint

PLACES = ("version_*/checkpoints", "lightning_logs/version_*/checkpoints", "checkpoints")
"""Folders below `default_root_dir` with checkpoints, of the command line and of Trainers in Python."""


def resolve_checkpoint(given: str, root: Path, may_be_missing: bool = False) -> Path | None:
    """Return the checkpoint that `--ckpt_path` names, after a check that it is whole.

    `last` is the one saved last below `root`, by the time that it holds; damaged ones are skipped with a warning.
    `best` is the same file if it holds the best policy.

    Args:
        given: A path, `last` or `best`.
        root: The runs' `default_root_dir`.
        may_be_missing: Return None if `last` is given and there is no checkpoint yet, so that a first run and its
            restarts can be the same command.

    Raises:
        ValueError: If there is no such checkpoint, or it is damaged or of another program.
    """
    if given not in ("last", "best"):
        path = Path(given).expanduser()
        _check(path)
        return path
    newest, content = _newest(given, root)
    if newest is None:
        if may_be_missing and given == "last":
            rank_zero_info(f"--ckpt_path last: there is no checkpoint in {str(root)!r} yet, so training starts anew")
            return None
        raise InputFileNotFoundError(f"--ckpt_path {given}: there is no checkpoint in {str(root)!r}")
    if given == "best":
        _check_best(content, newest)
    rank_zero_info(f"--ckpt_path {given}: {newest}, saved after {content['global_step']} updates")
    return newest


def export(
    ckpt_path: str | Path,
    out: str | Path,
    merge: bool = False,
    overwrite: bool = False,
    default_root_dir: str | Path = "runs",
) -> Path:
    """Write the folder of the model or adapter that a training checkpoint holds.

    Args:
        ckpt_path: A checkpoint written while training with one of the package's methods; `last` or `best` for one below
            `default_root_dir`.
        out: The folder to write; an earlier export there is replaced.
        merge: Merge an adapter into its base model, which is loaded from its original source. Only this needs more than
            the checkpoint. An adapter of a base model in memory is always merged.
        overwrite: Replace a model in `out` that is no export, too.
        default_root_dir: Where `last` and `best` are looked for: a run's `trainer.default_root_dir`.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint is damaged or can't be exported to that folder.
    """
    path = resolve_checkpoint(str(ckpt_path), Path(default_root_dir).expanduser())
    assert path is not None
    return export_checkpoint(path, out, merge, overwrite)


def _newest(given: str, root: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the whole checkpoint below `root` that was saved last, and its content.

    Raises:
        ValueError: If there are checkpoints, all of them damaged.
    """
    found, damaged = [], []
    for path in _candidates(root):
        try:
            content = read_checkpoint(path, mmap=True)
            found.append((content.get("saved_at", path.stat().st_mtime), content["global_step"], path, content))
        except InputError as error:
            damaged.append(str(error))
    for _, _, path, content in sorted(found, key=lambda item: item[:2], reverse=True):
        try:
            check_file(path)
        except InputError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            rank_zero_warn(f"--ckpt_path {given}: skipped, {reason}")
        return path, content
    if damaged:
        raise InputError(f"--ckpt_path {given}: no checkpoint in {str(root)!r} is whole: {damaged[0]}")
    return None, {}


def _candidates(root: Path) -> Iterable[Path]:
    for place in PLACES:
        for path in sorted(root.glob(f"{place}/*.ckpt")):
            if not path.name.startswith(PARTIAL):
                yield path


def _check(path: Path) -> None:
    name = f"--ckpt_path {str(path)!r}"
    if path.is_dir():
        if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
            raise InputError(f"{name} is the folder of a model, not a checkpoint: start from it by --model.policy")
        inside = [*sorted(path.glob("*.ckpt")), *sorted(path.glob("checkpoints/*.ckpt")), *_candidates(path)]
        hint = f"give a file, such as {str(inside[0])!r}" if inside else "give a .ckpt file, `last` or `best`"
        raise InputError(f"{name} is a folder: {hint}")
    if not path.is_file():
        raise InputFileNotFoundError(f"{name}: there is no such file")
    if path.suffix == ".safetensors":
        raise InputError(f"{name} holds only weights, not a checkpoint: give its folder as --model.policy")
    check_file(path)
    if "export" not in read_checkpoint(path, mmap=True):
        raise InputError(f"{name} was not written by lit_rlhf: give the .ckpt of a `fit`")


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
