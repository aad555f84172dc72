"""Turn errors of `transformers`, PEFT and the hub into one sentence: what can't be loaded, why, and what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from lit_rlhf.errors import InputError, InputFileNotFoundError


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise an `InputError` that says that `what` can't be loaded, and why, for an error in this context."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # these libraries raise every kind
        reason = explain(error)
        kind = InputFileNotFoundError if reason.startswith("there is no such folder") else InputError
        raise kind(f"{what} can't be loaded: {reason}") from error


def explain(error: BaseException) -> str:
    """Return the reason for a failure to load, and what to do about it."""
    chain, current = list[BaseException](), error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__  # type: ignore[assignment]
    kinds = {kind for one in chain for kind in type(one).__mro__}
    text = " ".join(str(error).split())
    if GatedRepoError in kinds or "gated repo" in text:
        return "it is gated: accept its conditions on the hub, then run `hf auth login` or give `load` a token"
    if RevisionNotFoundError in kinds or "is not a valid git identifier" in text:
        return "it has no such revision: give `load` another"
    if LocalEntryNotFoundError in kinds or "couldn't connect to" in text:
        return (
            "there is no such folder, it was not downloaded before, and the hub can't be reached: give a folder, or "
            "check the connection and that HF_HUB_OFFLINE is not set"
        )
    if RepositoryNotFoundError in kinds or HFValidationError in kinds or "is not a local folder" in text:
        return "there is no such folder, nor such a model on the hub: check the name; a private one needs a token"
    if "trust_remote_code" in text:
        return (
            "it needs Python code from its folder, which is not run: read that code and, if you trust it, give "
            "`load` trust_remote_code: true"
        )
    if "no file named" in text or ("not appear to have a file named" in text and "safetensors" in text):
        return (
            "it has no weights in safetensors format; pickled ones, which can run code, are read only if `load` has "
            "use_safetensors: false, and save_pretrained converts them"
        )
    if "requires bitsandbytes" in text:
        return "its weights are quantized by bitsandbytes, which is not installed: pip install 'lit_rlhf[quantized]'"
    if "Couldn't instantiate the backend tokenizer" in text:
        return "it has no tokenizer: save one into the folder, with tokenizer.save_pretrained"
    if "Unrecognized model in" in text:
        return "it has no config.json with a known model_type: give the folder that save_pretrained wrote"
    if match := re.search(r"model type `(\S+)` but Transformers does not recognize", text):
        return f"this version of transformers does not know its model_type {match[1]!r}: install a newer one"
    if match := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>.* AutoModel: (\w+)", text):
        if match[2] == "AutoModelForCausalLM":
            advice = "give a decoder-only language model; of a vision model that is the text model of its family"
            return f"transformers has no {match[2]} for a {match[1]}: {advice}"
        return f"transformers has no {match[2]} for a {match[1]}: give a model of another family"
    if match := re.search(r"unexpected keyword argument '(\w+)'", text):
        return f"`load` has no option {match[1]!r}: its options are those of from_pretrained"
    if "quant_method" in text:
        return (
            "`load` has a quantization_config without a known method: give {load_in_4bit: true} or {load_in_8bit: "
            "true}, with other options of transformers.BitsAndBytesConfig"
        )
    if SafetensorError in kinds:
        return f"its file of weights is damaged ({text}): copy or download it again"
    if isinstance(error, KeyError):
        return f"{text} is missing or unknown"
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0][:300].rstrip(".") or type(error).__name__
