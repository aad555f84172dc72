"""A causal language model that samples and scores itself, computing each prompt once for all its completions.

The k completions of a prompt share it: its keys and values are computed for n rows and repeated k times, in sampling
and, with gradient through the cache, in scoring. Log-probabilities come from the hidden states in chunks, so logits of
every position are never held at once. What a model does not allow (no cache; logits that it scales or caps) is found
by a probe on first use; the plain forward takes its place, and the log says so.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StopStringCriteria

from lit_rlhf import functional as F
from lit_rlhf.models.attention import use_cpu_attention
from lit_rlhf.models.decoders import CachedDecoder, PlainDecoder
from lit_rlhf.models.loading import (
    add_lora,
    check_vocabulary,
    disable_dropout,
    embedding_rows,
    end_of_sequence_ids,
    load_causal_lm,
)
from lit_rlhf.models.packing import packed_linears
from lit_rlhf.models.shared_prompt import (
    Given,
    accepts,
    as_sampled,
    checkpoints_activations,
    completion_features,
    defined,
    eval_mode,
    forward_arguments,
    hidden_states,
    owners,
    plain_features,
    probe_plain,
    shared_features,
    fallback_reason,
)
from lit_rlhf.models.sampling import Sampling, counter_based_uniform, decode
from lit_rlhf.tokenization import end_of_turn
from lit_rlhf.types import Completions, Prompts

LOGITS_AT_ONCE = 2**25
"""Elements of logits held at a time while scoring: 128 MiB in float32."""


class Policy(nn.Module):
    """A causal language model with its tokenizer.

    Args:
        model: A `transformers` causal language model, or a PEFT model around one. Its weights are trained where they
            require gradient. Its dropout is switched off.
        tokenizer: Its tokenizer.
        lora: Options of `peft.LoraConfig` to train a new adapter instead of the weights (`{}` for PEFT's defaults).

    Raises:
        ValueError: If the tokenizer does not fit the model, or LoRA is asked for on top of an adapter.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_vocabulary(model, tokenizer)
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"{model.active_peft_config.peft_type.value} trains prompts, not layers: use LoRA or the like"
            )
        self.new_adapter = lora is not None
        self.model = model if lora is None else add_lora(model, lora)
        self.tokenizer = tokenizer
        self.loaded = False
        self.shares_prompt: bool | None = None
        self.chunks_logits: bool | None = None
        disable_dropout(self.model)
        use_cpu_attention(self.model)
        self.train()  # Lightning warns of what trains in evaluation mode
        self.eos_ids = end_of_sequence_ids(self.causal_lm, tokenizer)
        if (turn := end_of_turn(tokenizer)) is not None and self.causal_lm.can_generate():
            stop_at(self.causal_lm.generation_config, turn)  # an export is to end its turns too
        if self.causal_lm.can_generate():
            make_savable(self.causal_lm.generation_config)

    @classmethod
    def from_pretrained(cls, source: str | Path, lora: dict[str, Any] | None = None, **options: Any) -> Policy:
        """Load a policy from a hub id or a folder: a causal language model, or a PEFT adapter of one.

        Args:
            source: The hub id or folder; `testbed` for the shipped one.
            lora: See the class.
            **options: Handed to `from_pretrained` of `transformers`. Weights are float32 unless `dtype` says otherwise.
        """
        model, tokenizer = load_causal_lm(source, **options)
        policy = cls(model, tokenizer, lora)
        policy.loaded = True  # an export may read the source again
        return policy

    @property
    def causal_lm(self) -> Any:
        """The `transformers` model itself, inside the PEFT model if there is one."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def save(self, folder: str | Path) -> None:
        """Write a folder that `transformers` (or PEFT, for an adapter) loads, tokenizer and chat template included."""
        self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))

    def reference(self) -> Reference:
        """What the policy is now, frozen: a new adapter switched off, otherwise a copy of what is trained."""
        if self.new_adapter:
            return Reference(self, adapter_off=True)
        shared: dict[int, Any] = {id(p): p for p in self.parameters() if not p.requires_grad}
        shared[id(self.tokenizer)] = self.tokenizer
        frozen = copy.deepcopy(self, shared).requires_grad_(False).eval()
        return Reference(frozen, adapter_off=False)

    # Sampling

    @torch.no_grad()
    def sample(
        self, prompts: Prompts, num_samples: int, sampling: Sampling, seed: int = 0, epoch: int = 0
    ) -> Completions:
        """Sample completions of each prompt.

        Args:
            prompts: The prompts.
            num_samples: Completions of each prompt, k.
            sampling: The options.
            seed: With `epoch` and the prompts' `index`, the address of the sampling noise: the same address gives the
                same completions, whatever else is in the batch.
            epoch: See `seed`.
        """
        self.probe()
        size = sampling.batch_size or len(prompts)
        blocks = [prompts.rows(slice(start, start + size)) for start in range(0, len(prompts), size)]
        with eval_mode(self.model), packed_linears(self.model):  # in training a model that checkpoints keeps no cache
            parts = [self._sample(defined(block.trim()), num_samples, sampling, seed, epoch) for block in blocks]
        return parts[0] if len(parts) == 1 else _join(parts)

    def _sample(self, prompts: Prompts, k: int, sampling: Sampling, seed: int, epoch: int) -> Completions:
        decoder = CachedDecoder(self, prompts, k) if self.shares_prompt else PlainDecoder(self, prompts, k)
        noise = None
        if not sampling.greedy:
            noise = counter_based_uniform(seed, epoch, prompts.index.tolist(), k, sampling.max_new_tokens)
        eos = torch.tensor(self.eos_ids, dtype=torch.long, device=prompts.tokens.device)
        stops = StopStringCriteria(self.tokenizer, list(sampling.stop)) if sampling.stop else None
        drawn = decode(decoder, noise, sampling, eos, stops)
        shape = (len(prompts), k, -1)
        return Completions(
            tokens=drawn.tokens.view(shape),
            mask=drawn.mask.view(shape),
            logprobs=drawn.logprobs.view(shape),
            finished=drawn.finished.view(len(prompts), k),
            entropy=drawn.entropy.view(shape),
            sampled_mass=drawn.sampled_mass.view(shape) if sampling.truncates else None,
        )

    # Scoring

    def logprobs(
        self, prompts: Prompts, completions: Given, temperature: float = 1.0
    ) -> Float[Tensor, "prompts samples tokens"]:
        """Log-probability of each token of the completions, in nats, at least float32, 0 where masked.

        Differentiable: the gradient runs through the shared prompt too.
        """
        return self.logprobs_from(self.features(prompts, completions), completions, temperature)

    def logprobs_from(
        self, features: Float[Tensor, "prompts samples tokens features"], completions: Given, temperature: float = 1.0
    ) -> Float[Tensor, "prompts samples tokens"]:
        """The same, from what `features` returned for these completions."""
        mask = completions.mask
        counted = mask.flatten().nonzero().squeeze(-1)
        features = features.flatten(0, 2).index_select(0, counted)
        scores = self._chunked_logprobs(features, completions.tokens[mask], temperature)
        return scores.new_zeros(mask.shape).masked_scatter(mask, scores)

    def features(self, prompts: Prompts, completions: Given) -> Float[Tensor, "prompts samples tokens features"]:
        """What the policy knows before each token of the completions: hidden states, or logits (see `project`)."""
        self.probe()
        shared = bool(self.shares_prompt) and not checkpoints_activations(self.model)
        with as_sampled(self.model):
            return completion_features(self.forward_features, self.causal_lm.config, prompts, completions, shared)

    def forward_features(
        self,
        ids: Int[Tensor, "rows columns"],
        mask: Bool[Tensor, "rows past_and_columns"],
        positions: Int[Tensor, "rows columns"],
        cache: DynamicCache | None,
        keep: int,
    ) -> Float[Tensor, "rows keep features"]:
        """Hidden states of the last `keep` columns, or their logits where the projection is the model's own affair."""
        causal_lm = self.causal_lm
        if self.chunks_logits:
            return hidden_states(cast(nn.Module, causal_lm.base_model), ids, mask, positions, cache, keep)
        arguments = forward_arguments(causal_lm.base_model, ids, mask, positions, cache)
        if accepts(type(causal_lm).forward, "logits_to_keep"):
            arguments["logits_to_keep"] = keep
        logits: Tensor = causal_lm(**arguments).logits
        return logits[:, -keep:]

    def project(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch vocabulary"]:
        """Turn what `forward_features` returned into logits."""
        head = self.causal_lm.get_output_embeddings()
        return cast(Tensor, head(features)) if self.chunks_logits else features

    def _chunked_logprobs(self, features: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        def score(features: Tensor, tokens: Tensor) -> Tensor:
            logits = F.at_least_float32(self.project(features))
            return F.token_logprobs(logits if temperature == 1 else logits / temperature, tokens)

        rows = max(1, LOGITS_AT_ONCE // self.causal_lm.config.get_text_config().vocab_size)
        if len(tokens) <= rows or not self.chunks_logits:
            return score(features, tokens)
        parts = [
            checkpoint(score, some, ids, use_reentrant=False, preserve_rng_state=False)
            for some, ids in zip(torch.split(features, rows), torch.split(tokens, rows), strict=True)
        ]
        return torch.cat(parts)

    # Which fast path this model allows

    @torch.no_grad()
    def probe(self) -> None:
        """Find out, once, whether this model allows chunked logits and a shared prompt; say so where it does not."""
        if self.shares_prompt is not None:
            return
        forward, config = self.forward_features, self.causal_lm.config
        with eval_mode(self.model):
            self.chunks_logits = False
            prompts, tokens, expected, noise, disturbed = probe_plain(
                forward, embedding_rows(self.causal_lm), next(self.parameters()).device
            )
            if disturbed:
                rank_zero_warn(
                    f"{self._name} does not leave padding out (its output changes by {disturbed:.0%} where there is "
                    "more of it): give data.batch_size=1, or prompts of one length"
                )
            self.chunks_logits = True
            reason = fallback_reason(lambda: self.project(plain_features(forward, prompts, tokens, 2)), expected, noise)
            if reason is None and not self._projects_plainly(prompts):
                reason = "it scales or caps its logits"
            self.chunks_logits = reason is None
            if reason is not None:
                rank_zero_info(f"{self._name} holds the logits of all positions at once: {reason}")
            shared = functools.partial(shared_features, forward, config, prompts, tokens, owners(2, 2))
            reason = fallback_reason(lambda: self.project(shared()), expected, noise)
            self.shares_prompt = reason is None
            if reason is not None:
                rank_zero_info(
                    f"{self._name} computes each prompt once a completion, and samples without a cache: {reason}"
                )

    @property
    def _name(self) -> str:
        return type(self.causal_lm).__name__

    def _projects_plainly(self, prompts: Prompts) -> bool:
        """Whether the logits are what the output layer returns, also where they are large (a cap bends only those)."""
        head, ramps = self.causal_lm.get_output_embeddings(), []

        def ramp(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            row = torch.linspace(-100, 100, output.shape[-1], dtype=output.dtype, device=output.device)
            ramps.append(row.expand_as(output))
            return ramps[-1]

        handle = head.register_forward_hook(ramp)
        try:
            logits = self.causal_lm(input_ids=prompts.tokens, attention_mask=prompts.mask.long()).logits
        finally:
            handle.remove()
        return len(ramps) == 1 and torch.equal(logits, ramps[0].to(logits.dtype))


class Reference:
    """The frozen policy that the KL is measured against. No module, so that it is never trained, wrapped or saved."""

    def __init__(self, policy: Policy, adapter_off: bool) -> None:
        self._policy = policy
        self._adapter_off = adapter_off

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        with torch.no_grad():
            if not self._adapter_off:
                yield
                return
            with cast(PeftModel, self._policy.model).disable_adapter():
                yield

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Reference:
        """Move a copy's weights, to where and what the policy's are; with an adapter switched off there are none."""
        if not self._adapter_off:
            own = next(self._policy.parameters()).dtype
            self._policy.to(device, None if own == dtype else dtype)
        return self

    def logprobs(self, prompts: Prompts, completions: Given, temperature: float = 1.0) -> Tensor:
        """See `Policy.logprobs`; without gradient."""
        with self._frozen():
            return self._policy.logprobs(prompts, completions, temperature)

    def sample(
        self, prompts: Prompts, num_samples: int, sampling: Sampling, seed: int = 0, epoch: int = 0
    ) -> Completions:
        """See `Policy.sample`."""
        with self._frozen():
            return self._policy.sample(prompts, num_samples, sampling, seed, epoch)


def stop_at(config: Any, token: int) -> None:
    """Add an id to those that end what a model generates."""
    known = config.eos_token_id
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if token not in ids:
        config.eos_token_id = [*ids, token]


def make_savable(config: Any) -> None:
    """Let a configuration sample that has options of sampling and does not: `transformers` loads but won't save it."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def _join(parts: list[Completions]) -> Completions:
    """Stack completions of different prompts, padded to the longest."""
    length = max(part.tokens.shape[-1] for part in parts)

    def pad(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (0, length - tensor.shape[-1])) if tensor.ndim == 3 else tensor

    columns = [vars(part.map(pad)) for part in parts]
    joined: dict[str, Any] = {
        name: None if first is None else torch.cat([column[name] for column in columns])
        for name, first in columns[0].items()
    }
    return Completions(**joined)
