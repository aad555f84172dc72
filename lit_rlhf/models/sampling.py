"""Sampling: its options, counter-based noise, and the decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from lit_rlhf import functional as F
from lit_rlhf.errors import InputError
from lit_rlhf.types import Completions, Prompts


@dataclass(frozen=True)
class Sampling:
    """Options of sampling.

    Attributes:
        max_new_tokens: Maximum number of new tokens; longer completions are truncated.
        min_new_tokens: No end-of-sequence token before this number of tokens.
        temperature: Divides the logits, in sampling and wherever log-probabilities are computed.
        top_p: Sample from the smallest set of tokens with at least this probability (1: from all).
        top_k: Sample from the k most likely tokens (0: from all).
        stop: Strings that end a completion, in addition to the end-of-sequence tokens. They are searched in its text,
            special tokens included, and stay in it, with what else their last token holds.
        greedy: Take the most likely token.
        batch_size: Number of prompts decoded at a time (None: all), to limit the memory of the cache.

    Raises:
        ValueError: If a value is outside its range.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: Sequence[str] = ()
    greedy: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            "temperature": (self.temperature > 0, "above 0; for the most likely token, give greedy: true"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "batch_size": (self.batch_size is None or self.batch_size >= 1, "at least 1, or null for all at once"),
        }
        for name, (valid, rule) in rules.items():
            if not valid:
                raise InputError(f"sampling: {name}={getattr(self, name)} must be {rule}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError(f"sampling: stop={self.stop!r} must be a list of strings that are not empty")

    @property
    def truncates(self) -> bool:
        """Whether sampling excludes tokens, which biases a policy gradient."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0 or self.min_new_tokens > 0)


@runtime_checkable
class Sampler(Protocol):
    """What samples completions of a policy: the policy itself, or an engine that has its weights."""

    def sample(
        self,
        prompts: Prompts,
        num_samples: int,
        sampling: Sampling,
        seed: int = 0,
        epoch: int = 0,
        with_greedy: bool = False,
    ) -> Completions:
        """Sample completions of each prompt; see `Policy.sample`."""
        ...


def counter_based_uniform(
    seed: int, epoch: int, index: Sequence[int], num_samples: int, length: int
) -> Float[Tensor, "rows length"]:
    """Return uniform numbers in [0, 1), one for each (seed, epoch, prompt, sample, token).

    A number depends on these five alone: not on the batch, the rank, other rows or the length.

    Returns:
        Float64 of shape `[len(index) * num_samples, length]`, prompt by prompt.
    """
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, prompt, sample]))).random(length)
        for prompt in index
        for sample in range(num_samples)
    ]
    return torch.from_numpy(np.stack(rows))


def with_greedy_rows(noise: Float[Tensor, "rows length"], num_samples: int) -> Float[Tensor, "greater length"]:
    """Add a row after the samples of each prompt, with NaN for noise: there the most likely token is taken."""
    groups = noise.view(-1, num_samples, noise.shape[-1])
    return torch.nn.functional.pad(groups, (0, 0, 0, 1), value=torch.nan).flatten(0, 1)


def inverse_cdf(probabilities: Float[Tensor, "rows vocabulary"], noise: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Return the token at which the cumulative probability exceeds the noise; never one of probability zero."""
    cumulative = F.to_float64(probabilities).cumsum(-1)
    total = cumulative[:, -1]
    level = torch.minimum(F.to_float64(noise) * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, level.unsqueeze(-1), right=True).squeeze(-1)
    return token.clamp(max=probabilities.shape[-1] - 1).to(probabilities.device)  # larger only if a probability is NaN


@runtime_checkable
class Decoder(Protocol):
    """A batch of rows that grows by one token at a time."""

    def start(self) -> Float[Tensor, "rows vocabulary"]:
        """Return the logits of the first token of every row."""
        ...

    def step(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocabulary"]:
        """Append a token to every row and return the logits of the next."""
        ...

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Drop all rows but these."""
        ...


def decode(
    decoder: Decoder,
    shape: tuple[int, int],
    noise: Float[Tensor, "rows length"] | None,
    sampling: Sampling,
    eos: Int[Tensor, " ids"],
    stops: Callable[[Tensor], Tensor] | None = None,
) -> Completions:
    """Sample until every row has ended or has `max_new_tokens` tokens. Rows that have ended leave the batch.

    Args:
        decoder: The rows.
        shape: Number of prompts and of samples of each, `(n, k)`.
        noise: Uniform numbers, one per row and token; NaN in a greedy row; not needed when greedy.
        sampling: The options.
        eos: Ids that end a completion.
        stops: Finds the rows that a stop string has ended, from their tokens so far.
    """
    logits = decoder.start()
    rows, device, length = logits.shape[0], logits.device, sampling.max_new_tokens
    tokens, mask = (torch.zeros(rows, length, dtype=dtype, device=device) for dtype in (torch.long, torch.bool))
    numbers = torch.zeros(3, rows, length, dtype=F.at_least_float32(logits).dtype, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    noise = None if noise is None else noise.to(F.float64_device(device))
    alive = torch.arange(rows, device=device)
    choose = _chooser(sampling, eos, mixed=noise is not None and bool(noise[:, 0].isnan().any()))
    for t in range(length):
        logits = F.at_least_float32(logits)
        logprobs = (logits if sampling.temperature == 1 else logits / sampling.temperature).log_softmax(-1)
        probabilities = logprobs.exp()
        row_noise = None if noise is None else noise[alive.to(noise.device), t]
        drawn, sampled_mass = choose(logprobs, probabilities, t, row_noise)
        tokens[alive, t], mask[alive, t] = drawn, True
        of_drawn = logprobs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        numbers[:, alive, t] = torch.stack([of_drawn, F.entropy(probabilities, logprobs), sampled_mass])
        ended = torch.isin(drawn, eos)
        if stops is not None:
            ended |= stops(tokens[alive, : t + 1])
        if bool(ended.any()):
            finished[alive[ended]] = True
            stay = remaining_rows(ended)
            alive, drawn = alive[stay], drawn[stay]
            if len(alive) == 0:
                break
            if t + 1 < length:
                decoder.keep(stay)
        if t + 1 < length:
            logits = decoder.step(drawn)
    end = t + 1
    of_drawn, entropy, mass = numbers[:, :, :end]
    check_finite(of_drawn)
    grid = (*shape, end)
    return Completions(
        tokens=tokens[:, :end].reshape(grid),
        mask=mask[:, :end].reshape(grid),
        logprobs=of_drawn.reshape(grid),
        finished=finished.view(shape),
        entropy=entropy.reshape(grid),
        sampled_mass=mass.reshape(grid) if sampling.truncates else None,
    )


def check_finite(logprobs: Tensor) -> None:
    """Check that all log-probabilities are finite.

    Raises:
        ValueError: If one is not.
    """
    if not bool(logprobs.isfinite().all()):
        raise InputError(
            "the policy's probabilities are not finite (NaN): it has diverged; lower the learning rate, clip gradients "
            "(--trainer.gradient_clip_val 1), or resume from an earlier checkpoint"
        )


def remaining_rows(ended: Bool[Tensor, " rows"]) -> Int[Tensor, " kept"]:
    """Return the rows that have not ended, in an order that moves few of them: the last rows fill the gaps."""
    stay = (~ended).nonzero().squeeze(-1)
    kept, gaps = len(stay), ended[: len(stay)].nonzero().squeeze(-1)
    order = torch.arange(kept, device=ended.device)
    order[gaps] = stay[kept - len(gaps) :]
    return order


Chooser = Callable[[Tensor, Tensor, int, Tensor | None], tuple[Tensor, Tensor]]


def _chooser(sampling: Sampling, eos: Tensor, mixed: bool) -> Chooser:
    """Return a function that picks a token of every row, and returns the probability mass that it sampled from.

    Args:
        sampling: The options.
        eos: Ids that end a completion.
        mixed: Whether some rows are greedy.
    """
    warpers: list[TopKLogitsWarper | TopPLogitsWarper] = []
    if sampling.top_k and not sampling.greedy:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1 and not sampling.greedy:
        warpers.append(TopPLogitsWarper(sampling.top_p))

    def choose(logprobs: Tensor, probabilities: Tensor, t: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pick token `t` of every row: by the noise, or the most likely one if there is none."""
        allowed = logprobs
        if t < sampling.min_new_tokens:
            allowed = allowed.index_fill(-1, eos, -torch.inf)
        for warp in warpers:
            allowed = warp(None, allowed)
        if noise is None:
            return allowed.argmax(-1), torch.ones_like(logprobs[:, 0])
        full = allowed is logprobs
        kept = probabilities if full else torch.where(allowed.isneginf(), 0.0, probabilities)
        drawn = inverse_cdf(kept, noise)
        if mixed:
            drawn = torch.where(noise.isnan().to(drawn.device), allowed.argmax(-1), drawn)
        return drawn, torch.ones_like(logprobs[:, 0]) if full else kept.sum(-1)

    return choose


def join_completions(parts: list[Completions], axis: int = 0) -> Completions:
    """Stack completions, padded to the longest: of different prompts, or along axis 1 of the same ones."""
    length = max(part.tokens.shape[-1] for part in parts)

    def pad(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, length - tensor.shape[-1])) if tensor.ndim == 3 else tensor

    columns = [vars(part.map(pad)) for part in parts]
    joined: dict[str, Any] = {
        name: None if first is None else torch.cat([column[name] for column in columns], axis)
        for name, first in columns[0].items()
    }
    return Completions(**joined)
