"""The reference of the KL by its source: the policy's initial state, another model, or none."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch import Tensor

from lit_rlhf.errors import InputError
from lit_rlhf.models.loading import check_same_tokens, embedding_rows
from lit_rlhf.models.offload import OffloadedWeights
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.pretrained import shared_options
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.models.sharding import Sharding
from lit_rlhf.models.shared_prompt import TokenSequences
from lit_rlhf.types import Completions, Prompts


class Reference:
    """The frozen policy that the KL is measured against; not a module, so it is never trained, wrapped or saved.

    Attributes:
        copy: The policy that it holds; None if it is the trained one, with its adapter switched off.
    """

    def __init__(self, policy: Policy, adapter_off: bool) -> None:
        self._policy = policy
        self.copy = None if adapter_off else policy

    @classmethod
    def of(cls, policy: Policy) -> Reference:
        """Return a policy as it is now, frozen: a new adapter switched off, or else a copy of the trained weights."""
        if policy.new_adapter:
            return cls(policy, adapter_off=True)
        shared: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
        shared[id(policy.tokenizer)] = policy.tokenizer
        return cls(copy.deepcopy(policy, shared).requires_grad_(False).eval(), adapter_off=False)

    @property
    def start(self) -> str:
        """Fingerprint of its weights."""
        return self._policy.start

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        with torch.no_grad():
            if self.copy is not None:
                yield
                return
            with cast(PeftModel, self._policy.model).disable_adapter():
                yield

    def to(self, policy: Policy, offload: bool = False) -> Reference:
        """Move a copy to a policy's device and dtype; with the adapter switched off there is no copy.

        Args:
            policy: The policy, with which it may share frozen weights.
            offload: Whether it stays in main memory between uses.
        """
        device, dtype = policy.model_forward.device, next(policy.parameters()).dtype
        if self.copy is None:
            if offload:
                rank_zero_warn("offload_reference has no effect: the reference is the policy with its adapter off")
            return self
        forward, other = self.copy.model_forward, next(self.copy.parameters()).dtype != dtype
        if not offload:
            self.copy.to(device, dtype if other else None)
        elif forward.offloaded is None or other:
            self.copy.to(dtype=dtype if other else None)
            forward.offloaded = OffloadedWeights(self.copy, device, shared=(*policy.parameters(), *policy.buffers()))
        else:
            forward.offloaded.device = device
        return self

    def shard(self, sharding: Sharding) -> None:
        """Shard the weights of a copy over ranks."""
        self._policy.shard(sharding)

    def without_gradient(self) -> contextlib.AbstractContextManager[None]:
        """See `ModelForward.without_gradient`."""
        return self._policy.model_forward.without_gradient()

    def logprobs(self, prompts: Prompts, completions: TokenSequences, temperature: float = 1.0) -> Tensor:
        """See `Policy.logprobs`; without gradient."""
        with self._frozen():
            return self._policy.logprobs(prompts, completions, temperature)

    def sample(
        self,
        prompts: Prompts,
        num_samples: int,
        sampling: Sampling,
        seed: int = 0,
        epoch: int = 0,
        with_greedy: bool = False,
    ) -> Completions:
        """See `Policy.sample`."""
        with self._frozen():
            return self._policy.sample(prompts, num_samples, sampling, seed, epoch, with_greedy)


def check_reference(source: str | None, kl_coef: float, offload: bool) -> None:
    """Check that a KL is measured if it counts, and that what is to be offloaded exists.

    Raises:
        ValueError: If there is no reference for it.
    """
    if source is None and kl_coef:
        raise InputError(
            f"kl_coef={kl_coef} needs a reference, and reference is null: set kl_coef to 0, or leave reference out for "
            "the policy's initial state"
        )
    if source is None and offload:
        raise InputError("offload_reference=True needs a reference, and reference is null: leave one of them out")


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
        return Reference.of(policy)
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
