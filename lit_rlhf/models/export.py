"""Model folders that `transformers` and PEFT load: written atomically, or rebuilt from a training checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import InputError, InputFileNotFoundError
from lit_rlhf.models.adapters import check_adapter, merge, save_adapter, tied_weights
from lit_rlhf.models.fingerprint import fingerprint
from lit_rlhf.models.pretrained import load_config, load_model
from lit_rlhf.models.shards import fill

BASE_CONFIG = "base_config"
HEAD = "score"
"""Head of a classifier: trained beside an adapter, and new if the base model is a policy."""
MARKER = "lit_rlhf.json"
"""File of a folder that the package has written, and may replace."""
BASE_OPTIONS = ("revision", "subfolder", "cache_dir", "variant")
"""Options of `from_pretrained` with which an export finds the base model again; a token is never saved."""


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder next to `target`, flush it to the disk, then replace `target` by it in one step."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        write(new)
        (new / MARKER).write_text(json.dumps({"written_by": "lit_rlhf"}))
        for path in (*new.rglob("*"), new):
            flush(path)
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        finally:  # an error or Ctrl-C between the two: what follows removes `old`
            if old.exists() and not target.exists():
                old.rename(target)
        flush(target.parent)


def flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some file systems can't flush a folder
            raise
    finally:
        os.close(descriptor)


def snapshot(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    processor_files: Mapping[str, bytes],
    in_memory: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return everything that a model folder holds except the weights, as plain data for a checkpoint.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        processor_files: Other files of the folder.
        in_memory: Whether the model was given in memory, so that its weights are in no folder.
        **options: Options of `from_pretrained` that the model was loaded with.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inner.config.save_pretrained(folder / BASE_CONFIG)
        if isinstance(model, PeftModel):
            model.active_peft_config.save_pretrained(name)
            options["revision"] = model.active_peft_config.revision or options.get("revision")
        if inner.can_generate():
            inner.generation_config.save_pretrained(folder / BASE_CONFIG)
        tokenizer.save_pretrained(folder)
        for file, content in processor_files.items():
            (folder / file).write_bytes(content)
        files = {
            str(path.relative_to(folder)): torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.stat().st_size
        }
    export = {
        "class": type(inner).__name__,
        "source": "" if in_memory else inner.config.name_or_path,
        "dtype": str(next(inner.parameters()).dtype).removeprefix("torch."),
        "load": {name: str(options[name]) for name in BASE_OPTIONS if options.get(name)},
        "files": files,
    }
    if not isinstance(model, PeftModel):
        return export
    base = base_fingerprint(inner, model.active_peft_config, model.active_adapter)
    return {**export, "adapter": model.active_adapter, "base": base}


def base_fingerprint(base: nn.Module, config: PeftConfig, adapter: str = "default") -> str:
    """Hash those weights of an adapter's base model that are in its folder, and that the adapter does not replace."""
    biases = {"bias"} if getattr(config, "bias", "none") != "none" else set()
    return fingerprint(base, skip={HEAD, adapter, *biases})


def export_checkpoint(ckpt_path: str | Path, out: str | Path, merge: bool = False, overwrite: bool = False) -> Path:
    """Write the folder of the model or adapter that a training checkpoint holds.

    Args:
        ckpt_path: A checkpoint written while training with one of the package's methods.
        out: The folder to write; an earlier export there is replaced.
        merge: Merge an adapter into its base model, which is loaded from its original source. Only this needs more than
            the checkpoint. An adapter of a base model in memory is always merged.
        overwrite: Replace a model in `out` that is no export, too.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint was written by another program or lacks weights, if the base model has changed
            since training, or if the folder holds something that is not to be replaced.
    """
    out = Path(out).expanduser()
    check_replaceable(out, overwrite)
    if not Path(ckpt_path).is_file():
        raise InputFileNotFoundError(f"--ckpt_path {str(ckpt_path)!r}: there is no such file")
    try:
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch raise every kind
        raise InputError(
            f"--ckpt_path {str(ckpt_path)!r} can't be read: it is damaged, or holds more than data"
        ) from error
    if "export" not in checkpoint:
        raise InputError(f"--ckpt_path {str(ckpt_path)!r} holds no model of lit_rlhf: give the .ckpt of a `fit`")
    fill(checkpoint, Path(ckpt_path), ["state_dict"])
    export = checkpoint["export"]
    prefix = export["prefix"]
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    for needed in (ckpt_path, *filter(os.path.isdir, [export["source"]])):
        if Path(needed).resolve().is_relative_to(out.resolve()):
            raise InputError(f"--out {str(out)!r} holds {str(needed)!r}, which the export needs: give another folder")
    write_folder(out, lambda folder: rebuild(export, weights, folder, merge))
    return out


def check_replaceable(folder: Path, overwrite: bool = False) -> None:
    """Check that a folder is empty or holds a model that may be replaced.

    Raises:
        ValueError: If not.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {str(folder)!r} is a file: give a folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if ".git" in names or (names and not names & {"config.json", "adapter_config.json"}):
        some = ", ".join(sorted(names)[:3])
        raise InputError(f"--out {str(folder)!r} holds something other than a model ({some}): give another folder")
    if names and MARKER not in names and not overwrite:
        raise InputError(
            f"--out {str(folder)!r} holds a model that lit_rlhf has not written: give another folder, or "
            "--overwrite true to replace it"
        )


def rebuild(export: dict[str, Any], weights: dict[str, Tensor], folder: Path, merging: bool = False) -> None:
    """Write the files of a model folder from a snapshot and weights.

    Args:
        export: What `snapshot` returned.
        weights: Weights of the model by name; of an adapter alone unless its model was given in memory.
        folder: An empty folder.
        merging: Whether to merge an adapter into its base model.
    """
    for name, content in export["files"].items():
        path = folder / safe_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.numpy().tobytes())
    architecture: Any = getattr(transformers, export["class"], None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        raise InputError(
            f"transformers has no class {export['class']!r}, which the model needs: use policy/last or policy/best, "
            "which training has written"
        )
    config = load_config(folder / BASE_CONFIG, "the checkpoint's model")
    config.name_or_path = export["source"]
    model: Any
    if (folder / "adapter_config.json").is_file():
        in_memory = not export["source"]  # the checkpoint then holds the base model's weights
        merging = merging or in_memory
        peft_config = PeftConfig.from_pretrained(str(folder))
        check_adapter(peft_config, "the checkpoint's adapter")
        base = empty(architecture, config)
        if merging and not in_memory:
            base = base_model(architecture, config, export, peft_config)
        peft_config.base_model_name_or_path = export["source"] or None
        with tied_weights():
            model = get_peft_model(base, peft_config, export["adapter"])
        _load(model, weights, complete=in_memory)
        if merging:
            (folder / "adapter_config.json").unlink()
            model = merge(model)
    else:
        model = empty(architecture, config)
        _load(model, weights, complete=True, source=export["source"])
        model.tie_weights()
    generation_config = folder / BASE_CONFIG / "generation_config.json"
    if generation_config.is_file() and not isinstance(model, PeftModel):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder / BASE_CONFIG)
    shutil.rmtree(folder / BASE_CONFIG)
    save_adapter(model, folder) if isinstance(model, PeftModel) else model.save_pretrained(str(folder))


def safe_name(name: str) -> str:
    """Return the name of a file that a checkpoint holds.

    Raises:
        ValueError: If it leads out of the exported folder.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or PureWindowsPath(name).drive:
        raise InputError(f"the checkpoint would write {name!r}, outside of --out: it is not as lit_rlhf wrote it")
    return name


def base_model(
    architecture: Any, config: PreTrainedConfig, export: dict[str, Any], adapter: PeftConfig
) -> PreTrainedModel:
    """Load the base model of an adapter from where training loaded it.

    Raises:
        ValueError: If it can't be loaded, or has changed since.
    """
    source, load = export["source"], {name: export["load"][name] for name in BASE_OPTIONS if name in export["load"]}
    if "quantization_config" in vars(config) and not hasattr(
        load_config(source, source, **load), "quantization_config"
    ):
        load["quantization_config"] = vars(config).pop("quantization_config")  # of `load`, not of the source
    options = {**load, "config": config, "dtype": export["dtype"]}
    new_head = architecture.__name__.endswith("ForSequenceClassification")
    base, _ = load_model(architecture, source, f"{source!r}, the adapter's base model,", new_head, **options)
    if export["base"] != base_fingerprint(base, adapter):
        raise InputError(
            f"{source!r} has changed since the adapter was trained on it: restore that model, or export without --merge"
        )
    return base


def empty(architecture: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model whose weights have no storage."""
    with torch.device("meta"):
        model: PreTrainedModel = architecture(config)
    return model


def _load(model: nn.Module, weights: dict[str, Tensor], complete: bool, source: str = "") -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or (complete and set(missing) - tied):
        names = sorted(unexpected or set(missing) - tied)
        raise InputError(f"the checkpoint does not fit its model ({source}): {json.dumps(names[:3])} ...")
