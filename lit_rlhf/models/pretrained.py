"""Load configurations, tokenizers and models: whole, and without running code.

A model is loaded with all its weights or not at all. Code in a folder is not run and pickled weights are not read,
unless the options ask for it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from lit_rlhf.errors import InputError, InputFileNotFoundError
from lit_rlhf.models.load_errors import explained
from lit_rlhf.models.quantized import keep_layout, plan_quantization

SHIPPED = {"testbed": Path(__file__).parents[1] / "testbed" / "assets" / "policy"}
"""Folders of the models that come with the package, by name."""

DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
"""Options that say where files are: all files of a model need them, its tokenizer's and its adapter's too."""

OWN_OPTIONS = ("revision", "subfolder", "variant", "gguf_file", "code_revision")
"""Options that are right for one model only, not for others that are loaded with it."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


NO_WEIGHTS: ContextVar[bool] = ContextVar("NO_WEIGHTS", default=False)
"""Whether models are loaded without storage for their weights, on the meta device."""


@contextlib.contextmanager
def without_weights(active: bool) -> Iterator[None]:
    """Load models without storage for their weights within this context: another rank sends them."""
    before = NO_WEIGHTS.set(active)
    try:
        yield
    finally:
        NO_WEIGHTS.reset(before)


CONFIG_ONLY: ContextVar[bool] = ContextVar("CONFIG_ONLY", default=False)
"""Whether models are built from their configurations alone, on the meta device."""


@contextlib.contextmanager
def config_only() -> Iterator[None]:
    """Build models from their configurations alone, on the meta device, within this context: no weights are read."""
    CONFIG_ONLY.set(True)
    try:
        yield
    finally:
        CONFIG_ONLY.set(False)


def resolve(source: str | Path) -> str:
    """Resolve `source` to a folder or hub id; `testbed` is the policy that comes with the package.

    Raises:
        FileNotFoundError: If `source` can only be a folder, and there is none.
    """
    text = str(source)
    if text in SHIPPED:
        return str(SHIPPED[text])
    looks_like_a_path = text.count("/") > 1 or text.startswith((".", "/", "~"))
    if looks_like_a_path and not Path(text).expanduser().is_dir():
        raise InputFileNotFoundError(f"{text!r}: there is no such folder; give a folder or a model's id on the hub")
    return str(Path(text).expanduser().resolve()) if Path(text).expanduser().is_dir() else text


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of `from_pretrained` that tokenizers and configurations accept, too."""
    names = (*DOWNLOAD_OPTIONS, "gguf_file")
    trusted = {"trust_remote_code": options.get("trust_remote_code", False)}  # by default transformers asks on stdin
    return {**download_options(options, names), **trusted}


def download_options(options: Mapping[str, Any], names: tuple[str, ...] = DOWNLOAD_OPTIONS) -> dict[str, Any]:
    """Return those options that say where files are."""
    return {name: options[name] for name in names if options.get(name) is not None}


def shared_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options that also apply to another model, such as an adapter's base model."""
    return {name: value for name, value in options.items() if name not in OWN_OPTIONS}


def is_adapter(name: str, **options: Any) -> bool:
    """Whether a folder or hub id holds a PEFT adapter."""
    with explained(f"{name!r}"):
        return find_adapter_config_file(name, **download_options(options)) is not None


def load_config(source: str | Path, what: str, **options: Any) -> PreTrainedConfig:
    """Load a model's configuration.

    Args:
        source: The hub id or folder.
        what: Name in messages.
        **options: Options of `from_pretrained`.

    Raises:
        ValueError: If it can't be loaded, or is that of an encoder-decoder.
    """
    try:
        name = resolve(source)
    except InputFileNotFoundError as error:
        raise InputFileNotFoundError(f"{what} can't be loaded: {error}") from error
    with explained(what):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **hub_options(options))
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{what} is an encoder-decoder ({config.model_type}), and completions continue their prompts: give a "
            "decoder-only model"
        )
    return config


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a configuration belongs to a sequence-classification model."""
    return any(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or ())


def load_tokenizer(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        source: The hub id or folder.
        **options: Options of `from_pretrained`; those that concern only weights are not used.

    Raises:
        ValueError: If there is none.
    """
    name = resolve(source)
    try:
        with explained(f"the tokenizer of {str(source)!r}"):
            return AutoTokenizer.from_pretrained(name, **hub_options(options))
    except InputError:
        if not is_adapter(name, **options):
            raise
    base = PeftConfig.from_pretrained(name, **download_options(options)).base_model_name_or_path
    with base_model_of(source):  # PEFT itself saves no tokenizer with an adapter
        return load_tokenizer(str(base), **shared_options(options))


@contextlib.contextmanager
def base_model_of(adapter: str | Path) -> Iterator[None]:
    """Say what to do if the base model of an adapter is not where it was."""
    try:
        yield
    except InputFileNotFoundError as error:
        raise InputFileNotFoundError(
            f"{error}; it is the base model of {str(adapter)!r}: if it has moved, change base_model_name_or_path in "
            "adapter_config.json there"
        ) from error


def load_model(
    loader: Any, source: str | Path, what: str, new_head: bool = False, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model with all its weights.

    Args:
        loader: A class with `from_pretrained`.
        source: The hub id or folder.
        what: Name in messages.
        new_head: Whether weights outside the trunk may be missing; they are then new.
        **options: Options of `from_pretrained`. Weights load in float32 by default (`dtype`).

    Returns:
        The model and the names of the weights that are new.

    Raises:
        ValueError: If it can't be loaded, or if weights are missing or don't fit.
    """
    options = {**options, "trust_remote_code": options.get("trust_remote_code", False)}
    options["use_safetensors"] = True if options.get("use_safetensors", True) else None  # None: pickled ones, too
    options["dtype"] = checked_dtype(options.pop("torch_dtype", None) or options.get("dtype") or torch.float32)
    if CONFIG_ONLY.get():
        return from_config(loader, source, what, **options), []
    if NO_WEIGHTS.get():
        options["device_map"] = "meta"
    with explained(what):
        # sizes that don't fit are reported below, with the names of the weights
        model, report = loader.from_pretrained(
            resolve(source), **{**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
        )
    keep_layout(model)
    trunk = f"{model.base_model_prefix}."
    new = sorted(report["missing_keys"])
    missing = [name for name in new if name.startswith(trunk) or not new_head]
    if missing:
        raise InputError(f"{what} lacks {listed(missing, model)}: {why_missing(missing, report['unexpected_keys'])}")
    if report["mismatched_keys"]:
        name, saved, expected = sorted(report["mismatched_keys"])[0]
        raise InputError(
            f"{what} has weights of another size than its config.json says: {name!r} is {list(saved)} and must be "
            f"{list(expected)}"
        )
    if unused := unused_parts(model, report["unexpected_keys"]):
        raise InputError(
            f"{what} has weights that a {type(model).__name__} would ignore, such as {unused[0]!r}: its config.json is "
            "of another model, or the weights are quantized and config.json lacks quantization_config"
        )
    return model, new


def from_config(loader: Any, source: str | Path, what: str, **options: Any) -> PreTrainedModel:
    """Build a model from its configuration, on the meta device."""
    config: Any = load_config(source, what, **options)
    config.num_labels = options.get("num_labels", config.num_labels)
    trusted = {"trust_remote_code": options["trust_remote_code"]}
    dtype = getattr(config, "dtype", None) if options["dtype"] == "auto" else options["dtype"]
    with explained(what), torch.device("meta"):
        model: PreTrainedModel = loader.from_config(config, dtype=dtype or torch.float32, **trusted)
    if quantization := options.get("quantization_config") or getattr(config, "quantization_config", None):
        plan_quantization(model, quantization)
    return model


def listed(names: list[str], model: Any) -> str:
    """Describe missing weights: their number, the class, the first names."""
    some = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} of the weights of a {type(model).__name__} ({some}), which would be random"


def why_missing(missing: list[str], unexpected: set[str]) -> str:
    """Return what to do about missing weights: they may be in the file under other names."""
    ends = (name.removesuffix(missing[0]) for name in sorted(unexpected) if name.endswith(missing[0]))
    if prefix := next(ends, ""):
        return f"its file has them with the prefix {prefix!r}: save the model without its wrapper"
    head = next((name for name in sorted(unexpected) if re.match(r"score\.|classifier\.|v_head\.", name)), "")
    if head:
        return f"it is a reward model, with {head!r} instead: give a causal language model"
    return "give a folder that holds a whole model of this kind"


def unused_parts(model: Any, unexpected: set[str]) -> list[str]:
    """Return unexpected weights that belong to a layer of the model, such as a bias, or to one layer more than it has.

    Weights of modules that the model lacks are ignored: heads for other tasks, images, drafting of tokens.
    """
    modules = dict(model.named_modules())

    def unused(name: str) -> bool:
        parts = name.split(".")
        for i in range(1, len(parts)):
            module = modules.get(".".join(parts[:i]))
            if isinstance(module, nn.ModuleList):
                if parts[i].isdecimal() and int(parts[i]) >= len(module):
                    return True
            elif isinstance(getattr(module, "weight", None), torch.Tensor):
                return True
        return False

    trunk = model.base_model_prefix  # a file of the trunk alone has names without it
    return [name for name in sorted(unexpected) if unused(name) or unused(f"{trunk}.{name}")]


def processor_files(config: PreTrainedConfig, **options: Any) -> dict[str, bytes]:
    """Return the files of a model's image, video and audio processor, by name; empty for a model of text."""
    if config.get_text_config() is config or not config.name_or_path:
        return {}
    found = {}
    for name in PROCESSOR_FILES:
        with contextlib.suppress(OSError):
            path = cached_file(
                config.name_or_path, name, _raise_exceptions_for_missing_entries=False, **download_options(options)
            )
            found.update({name: Path(path).read_bytes()} if path else {})
    return found


def checked_dtype(dtype: Any) -> Any:
    """Return a dtype, given by itself or by name.

    Raises:
        ValueError: If there is no such dtype of weights.
    """
    name = str(dtype).removeprefix("torch.")
    found = getattr(torch, name, None)
    if name == "auto":
        return name
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype={name!r} is no dtype of weights: use float32, bfloat16, float16 or auto")
    return found
