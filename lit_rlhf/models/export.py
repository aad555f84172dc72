"""Model folders that `transformers` and PEFT load: written atomically, or rebuilt from a training checkpoint."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import InputError, InputFileNotFoundError
from lit_rlhf.models.fingerprint import fingerprint

BASE_CONFIG = "base_config"


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder next to `target`, then replace `target` by it in one step."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        write(new)
        if target.exists():
            target.rename(old)
        new.rename(target)


def snapshot(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return everything that a model folder holds except the weights, as plain data for a checkpoint."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inner.config.save_pretrained(folder / BASE_CONFIG)
        if isinstance(model, PeftModel):
            model.peft_config[model.active_adapter].save_pretrained(name)
        elif inner.can_generate():
            inner.generation_config.save_pretrained(folder / BASE_CONFIG)
        tokenizer.save_pretrained(folder)
        files = {
            str(path.relative_to(folder)): torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    dtype = str(next(inner.parameters()).dtype).removeprefix("torch.")
    export = {"class": type(inner).__name__, "source": inner.config.name_or_path, "dtype": dtype, "files": files}
    return {**export, "base": fingerprint(inner)} if isinstance(model, PeftModel) else export


def export_checkpoint(ckpt_path: str | Path, out: str | Path, merge: bool = False) -> Path:
    """Write the folder of the model or adapter that a training checkpoint holds.

    Args:
        ckpt_path: A checkpoint written while training with one of the package's methods.
        out: The folder to write; a folder that holds a model is replaced.
        merge: Merge an adapter into its base model, which is loaded from its original source. Only this needs more than
            the checkpoint.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint was written by another program or lacks weights, if the base model has changed
            since training, or if the folder holds something other than a model.
    """
    check_replaceable(Path(out))
    if not Path(ckpt_path).is_file():
        raise InputFileNotFoundError(f"--ckpt_path {str(ckpt_path)!r}: there is no such file")
    checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    if "export" not in checkpoint:
        raise InputError(f"--ckpt_path {str(ckpt_path)!r} holds no model of lit_rlhf: give the .ckpt of a `fit`")
    export = checkpoint["export"]
    prefix = export["prefix"]
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    write_folder(Path(out), lambda folder: _rebuild(export, weights, folder, merge))
    return Path(out)


def check_replaceable(folder: Path) -> None:
    """Raise a ValueError if a folder holds something other than a model, which would be lost."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {str(folder)!r} is a file: give a folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & {"config.json", "adapter_config.json"}:
        some = ", ".join(sorted(names)[:3])
        raise InputError(f"--out {str(folder)!r} holds something other than a model ({some}): give another folder")


def _rebuild(export: dict[str, Any], weights: dict[str, Tensor], folder: Path, merge: bool) -> None:
    for name, content in export["files"].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.numpy().tobytes())
    model: Any
    architecture = getattr(transformers, export["class"], None)
    if architecture is None:
        raise InputError(
            f"transformers has no class {export['class']!r}, which the model needs: use policy/last or policy/best, "
            "which training has written"
        )
    config = AutoConfig.from_pretrained(folder / BASE_CONFIG)
    config.name_or_path = export["source"]
    if (folder / "adapter_config.json").is_file():
        if merge:
            if not export["source"]:
                raise InputError(
                    "the adapter's base model was given in memory: export without --merge, and merge with PEFT"
                )
            options = {"revision": export["revision"]} if export.get("revision") else {}
            base = architecture.from_pretrained(export["source"], config=config, dtype=export["dtype"], **options)
            if export.get("base", fingerprint(base)) != fingerprint(base):
                raise InputError(
                    f"{export['source']!r} has changed since the adapter was trained on it: restore that model, or "
                    "export without --merge"
                )
        else:  # only the adapter is saved, so its base model needs no weights
            with torch.device("meta"):
                base = architecture(config)
        model = get_peft_model(base, PeftConfig.from_pretrained(str(folder)))
        _load(model, weights, complete=False)
        if merge:
            (folder / "adapter_config.json").unlink()
            model = model.merge_and_unload()
    else:
        dtype = next(iter(weights.values())).dtype
        model = architecture(config).to(dtype)
        _load(model, weights, complete=True, source=export["source"])
        generation_config = folder / BASE_CONFIG / "generation_config.json"
        if generation_config.is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder / BASE_CONFIG)
    shutil.rmtree(folder / BASE_CONFIG)
    model.save_pretrained(str(folder))


def _load(model: nn.Module, weights: dict[str, Tensor], complete: bool, source: str = "") -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=not complete)
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or (complete and set(missing) - tied):
        names = sorted(unexpected or set(missing) - tied)
        raise InputError(f"the checkpoint does not fit its model ({source}): {json.dumps(names[:3])} ...")
