"""Checks of sequence-classification models with one label: reward models and critics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from lit_rlhf.errors import InputError
from lit_rlhf.models.pretrained import is_adapter, is_classifier, load_config, resolve


def read_config(source: str | Path, name: str, **options: Any) -> PreTrainedConfig:
    """Read the configuration of a model to load.

    Args:
        source: The hub id or folder.
        name: Name in messages.
        **options: Options of `from_pretrained`.

    Raises:
        ValueError: If it can't be read, is an adapter or an encoder-decoder, or is a sequence-classification model with
            more than one label.
    """
    folder = Path(resolve(source), options.get("subfolder") or "")
    if is_adapter(resolve(source), **options) and not (folder / "config.json").is_file():
        raise InputError(
            f"{name} is an adapter: merge it first, with lit-rlhf export --ckpt_path last.ckpt --out FOLDER --merge "
            "true, or without the checkpoint of its run with merge_and_unload of PEFT"
        )
    config = load_config(source, name, **options)
    if is_classifier(config):
        check_one_label(config, name)
    return config


def check_reads_last_token(model: Any, name: str) -> None:
    """Check that a sequence-classification model is a decoder: an encoder has a head that reads its first token.

    Raises:
        ValueError: If it is not.
    """
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    if not hasattr(model, "score") and not causal:
        raise InputError(
            f"{name} is a {type(model).__name__}, an encoder, which has another input format: give a decoder-only "
            "model, or call that one in a reward function"
        )


def check_one_label(config: PreTrainedConfig, name: str) -> None:
    """Raise a ValueError if a model has more than one label."""
    if config.num_labels != 1:
        raise InputError(f"{name} has {config.num_labels} labels: give a model with one label, since it is one number")
