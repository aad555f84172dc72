"""The reference of the KL by its source: the policy's initial state, another model, or none."""

from __future__ import annotations

from typing import Any

from lit_rlhf.errors import InputError
from lit_rlhf.models.loading import check_same_tokens, embedding_rows
from lit_rlhf.models.policy import Policy, Reference
from lit_rlhf.models.pretrained import shared_options


def check_reference(source: str | None, kl_coef: float) -> None:
    """Check that a KL is measured if it counts.

    Raises:
        ValueError: If there is no reference for it.
    """
    if source is None and kl_coef:
        raise InputError(
            f"kl_coef={kl_coef} needs a reference, and reference is null: set kl_coef to 0, or leave reference out for "
            "the policy's initial state"
        )


def load_reference(policy: Policy, source: str | None, **options: Any) -> Reference | None:
    """Return the reference of a policy that has not been trained yet.

    Args:
        policy: The policy.
        source: `policy` for its initial state, a hub id or folder of another model, or None for no reference.
        **options: Options of `from_pretrained` that the policy was loaded with.

    Raises:
        ValueError: If the model can't be loaded, or has another tokenizer.
    """
    if source is None:
        return None
    if source == "policy":
        return policy.reference()
    options = shared_options(options)
    check_same_tokens("reference", source, policy.tokenizer, complete=True, **options)
    reference = Policy.from_pretrained(source, **options)
    known, used = embedding_rows(reference.causal_lm), len(policy.tokenizer)
    if known < used:
        raise InputError(
            f"the reference {source!r} embeds {known} token ids and the policy's tokenizer has {used}: give a model "
            "with the same tokenizer, such as one that started from the same model"
        )
    return Reference(reference.requires_grad_(False).eval(), adapter_off=False)
