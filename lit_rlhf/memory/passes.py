"""The passes of a run, rehearsed with batches of full length: sampling, scoring, training, the optimizer's step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.algorithms import Algorithm
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.memory.models import Models
from lit_rlhf.memory.rehearsal import Rehearsal
from lit_rlhf.models.cpu import compute_dtype
from lit_rlhf.models.decoders import CAPACITY_STEP, MIN_WEIGHT_SIZE, CachedDecoder, PlainDecoder, cast_once
from lit_rlhf.models.forward import eval_mode
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling, decode
from lit_rlhf.models.scalar import ScalarModel
from lit_rlhf.models.shared_prompt import fill_padding
from lit_rlhf.types import Completions, Preferences, Prompts


@dataclass(frozen=True)
class Shape:
    """The largest batch of a pass: prompts, completions of each, and their tokens."""

    prompts: int
    samples: int
    prompt_tokens: int
    completion_tokens: int

    def batch(self) -> Prompts:
        """Return the prompts; the first of several is padded, as prompts of different lengths are."""
        ids = torch.zeros(self.prompts, self.prompt_tokens, dtype=torch.long)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, 0] = self.prompts == 1 or self.prompt_tokens == 1
        return Prompts(ids, mask, torch.arange(self.prompts))

    def completions(self) -> Completions:
        """Return completions of full length."""
        tokens = torch.zeros(self.prompts, self.samples, self.completion_tokens, dtype=torch.long)
        full = torch.ones_like(tokens, dtype=torch.bool)
        return Completions(tokens, full, torch.zeros(tokens.shape), full[..., 0])


@dataclass(frozen=True)
class Peak:
    """Bytes beyond the weights: those kept until the backward pass, and the most at any time."""

    kept: int
    most: int


@dataclass(frozen=True)
class Passes:
    """Rehearses the passes of an algorithm.

    Attributes:
        algorithm: The algorithm, with models that have no storage.
        models: Its models.
        autocast: Dtype of products under autocast; None without.
        on_cpu: Whether the kernels are those of a CPU.
    """

    algorithm: Algorithm
    models: Models
    autocast: torch.dtype | None
    on_cpu: bool

    @contextlib.contextmanager
    def rehearse(self) -> Iterator[Rehearsal]:
        """Count what is held within this context, in the run's precision."""
        models = self.models
        scored = [scorer.model for scorer in models.rewards]
        with contextlib.ExitStack() as stack:
            if not self.on_cpu:
                for model in (models.trained, models.critic, models.reference, *scored):
                    if model is not None:
                        vars(model.model_forward)["fast_attention"] = contextlib.nullcontext
            stack.enter_context(torch.autocast("cpu", self.autocast, enabled=self.autocast is not None))
            yield stack.enter_context(Rehearsal(models.fake, models.weights))

    def sampling(self, shape: Shape, sampling: Sampling) -> Peak:
        """Rehearse the first tokens and, with the cache at its largest, the last."""
        policy, steps = (
            self.models.trained,
            replace(sampling, max_new_tokens=2, min_new_tokens=min(sampling.min_new_tokens, 2)),
        )
        assert isinstance(policy, Policy)
        prompts, k = fill_padding(shape.batch()), shape.samples
        grid = (shape.prompts, k)
        with self.rehearse() as rehearsal, torch.no_grad(), eval_mode(policy.model), self.prepared(policy.model):
            copies = rehearsal.held
            decoder = (CachedDecoder if policy.shares_prompt else PlainDecoder)(policy.model_forward, prompts, k)
            noise, eos = torch.zeros(shape.prompts * k, 2), torch.tensor([0])
            decode(decoder, grid, noise, steps, eos)
            late = Lengthened(decoder, shape.prompt_tokens, shape.completion_tokens)
            decode(late, grid, noise, steps, eos)
            return Peak(copies, rehearsal.peak)

    @contextlib.contextmanager
    def prepared(self, model: nn.Module) -> Iterator[None]:
        """Let linear layers compute with copies of their weights where `prepared_linears` does."""
        layers = [
            layer
            for layer in model.modules()
            if type(layer) is nn.Linear and not hasattr(layer, "quantized_bytes")
            if layer.weight.numel() >= MIN_WEIGHT_SIZE
            if self.on_cpu or compute_dtype(layer.weight) != layer.weight.dtype
        ]
        for layer in layers:
            weight = layer.weight.detach()
            same = compute_dtype(weight) == weight.dtype
            layer.forward = cast_once(weight.clone() if same else weight, layer.bias)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def scoring(self, shape: Shape, score: Callable[[Prompts, Completions], Any]) -> Peak:
        """Rehearse a pass without gradient."""
        prompts, completions = shape.batch(), shape.completions()
        with self.rehearse() as rehearsal, torch.no_grad():
            score(prompts, completions)
            return Peak(0, rehearsal.peak)

    def training(self, shape: Shape, accumulated: bool, gradients: bool = True) -> Peak:
        """Rehearse a training step.

        Args:
            shape: Its batch.
            accumulated: Whether gradients of an earlier step of the update are held.
            gradients: Whether gradients count.
        """
        trained = [p for p in self.algorithm.parameters() if p.requires_grad]
        hooks = []
        with self.rehearse() as rehearsal:
            if accumulated and gradients:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
            if not gradients:
                hooks = [p.register_post_accumulate_grad_hook(drop_gradient) for p in trained]  # type: ignore[no-untyped-call]
            before = rehearsal.held
            loss = sum(output.sum() for output in self.outputs(shape))
            kept = rehearsal.held - before
            loss.backward()  # type: ignore[union-attr]
            peak = Peak(kept, rehearsal.peak)
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
        return peak

    def outputs(self, shape: Shape) -> list[Tensor]:
        """Return what the loss of a step is computed from, with gradient."""
        prompts, completions, trained = shape.batch(), shape.completions(), self.models.trained
        if isinstance(trained, ScalarModel):
            return [trained.score(prompts, Preferences(prompts, completions.tokens, completions.mask))]
        if not isinstance(self.algorithm, OnlineAlgorithm):
            return [trained.logprobs(prompts, completions)]
        zeros = torch.zeros(completions.tokens.shape[:2])
        part = self.algorithm.evaluate(
            self.algorithm.rollout_type(
                prompts=prompts,
                completions=completions,
                reference_logprobs=torch.zeros(completions.tokens.shape),
                rewards=zeros,
                component_rewards={},
                valid=completions.finished,
                returns=zeros,
                advantages=zeros,
            )
        )
        return [x for x in (part.logprobs, getattr(part, "values", None)) if x is not None]

    def optimizer_step(self, fused: bool) -> Peak:
        """Rehearse a step of the optimizer, which makes its state.

        Args:
            fused: Whether Adam is fused where its options leave that open.
        """
        optimizer: Any = self.algorithm.make_optimizer(self.algorithm.parameter_groups())
        if type(optimizer).__module__.startswith("bitsandbytes."):
            optimizer.update_step = lambda *args: None  # a kernel that reads numbers; the state is made before
        with self.rehearse() as rehearsal:
            adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
            for group in optimizer.param_groups:
                if fused and adam and group["fused"] is None and group["foreach"] is None:
                    group["fused"] = True
                for parameter in group["params"]:
                    parameter.grad = torch.empty_like(parameter)
            gradients = rehearsal.held
            rehearsal.count(state for of_one in optimizer.state.values() for state in of_one.values())
            optimizer.step()
            peak = Peak(rehearsal.held - gradients, rehearsal.peak - gradients)
        optimizer.zero_grad(set_to_none=True)
        return peak


class Lengthened:
    """A decoder whose cache is at the last growth before the end.

    Args:
        decoder: The decoder, after its start.
        prompt_tokens: Tokens of a prompt.
        completion_tokens: Tokens of a completion.
    """

    def __init__(self, decoder: CachedDecoder | PlainDecoder, prompt_tokens: int, completion_tokens: int) -> None:
        self.decoder, self.keep = decoder, decoder.keep
        fed = max(1, completion_tokens - 1)
        growth = CAPACITY_STEP + 1
        self.length = prompt_tokens + growth * ((fed - 1) // growth)
        self.whole = prompt_tokens + fed - 1

    def start(self) -> Tensor:
        """Give the rows their length, and return the logits of the next token."""
        decoder, rows = self.decoder, len(self.decoder.mask)
        length = self.length if isinstance(decoder, CachedDecoder) else self.whole
        decoder.mask = torch.ones(rows, length, dtype=torch.bool)
        if isinstance(decoder, PlainDecoder):
            decoder.ids = torch.zeros(rows, length, dtype=torch.long)
            return decoder.step(decoder.ids[:, 0])
        decoder.positions = torch.full((rows, 1), length)
        for layer in decoder.cache.layers:
            lengthen(layer, length)
        return decoder.step(torch.zeros(rows, dtype=torch.long))

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        return self.decoder.step(tokens)


def lengthen(layer: Any, length: int) -> None:
    """Give a layer of a cache this many tokens, or as many as its window keeps."""
    window = getattr(layer, "sliding_window", None)
    kept = length if window is None else min(length, window - 1)
    for name in ("keys", "values"):
        states = getattr(layer, name)
        setattr(layer, name, states.new_empty(*states.shape[:-2], kept, states.shape[-1]))
    if hasattr(layer, "store"):
        layer.store = None
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length


def drop_gradient(parameter: Tensor) -> None:
    """Free the gradient of a parameter."""
    parameter.grad = None
