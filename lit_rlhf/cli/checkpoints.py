"""What `--ckpt_path` may name: a checkpoint, or `last` and `best` of the runs below a root."""

from __future__ import annotations

from pathlib import Path

from lit_rlhf.errors import InputError, InputFileNotFoundError
from lit_rlhf.models.export import export_checkpoint
from lit_rlhf.models.shards import check_shards
from lit_rlhf.training.checkpoint_files import check_file, read_checkpoint
from lit_rlhf.training.checkpoint_search import candidates, find_checkpoint


def resolve_checkpoint(given: str, root: Path, may_be_missing: bool = False) -> Path | None:
    """Return the checkpoint that `--ckpt_path` names, after a check that it is whole.

    Args:
        given: A path, or `last` or `best`: see `find_checkpoint`.
        root: The runs' `default_root_dir`.
        may_be_missing: Return None if `last` is given and there is no checkpoint yet.

    Raises:
        ValueError: If there is no such checkpoint, or it is damaged or of another program.
    """
    if given not in ("last", "best"):
        path = Path(given).expanduser()
        _check(path)
        return path
    return find_checkpoint(given, root, may_be_missing)


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


def _check(path: Path) -> None:
    name = f"--ckpt_path {str(path)!r}"
    if path.is_dir():
        if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
            raise InputError(f"{name} is the folder of a model, not a checkpoint: start from it by --model.policy")
        inside = [*sorted(path.glob("*.ckpt")), *sorted(path.glob("checkpoints/*.ckpt")), *candidates(path)]
        hint = f"give a file, such as {str(inside[0])!r}" if inside else "give a .ckpt file, `last` or `best`"
        raise InputError(f"{name} is a folder: {hint}")
    if not path.is_file():
        raise InputFileNotFoundError(f"{name}: there is no such file")
    if path.suffix == ".safetensors":
        raise InputError(f"{name} holds only weights, not a checkpoint: give its folder as --model.policy")
    check_file(path)
    content = read_checkpoint(path, mmap=True)
    check_shards(content, path)
    if "export" not in content:
        raise InputError(f"{name} was not written by lit_rlhf: give the .ckpt of a `fit`")
