"""Probe a model on a small input: whether the head can be applied apart from the trunk, and a prompt be shared.

A fast path is used if its output equals that of the plain forward pass, up to rounding. Otherwise the plain forward
pass is used, and a warning gives the reason. Relative to the size of the output, another order of the same operations
changed sound models by up to 7e-7 in float32, 1e-3 in float16 and 2e-2 in bfloat16; a cache that loses a key, or
attention to later tokens, by at least 0.15 in any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_rlhf.models.cpu import compute_dtype
from lit_rlhf.models.forward import ModelForward, eval_mode
from lit_rlhf.models.shared_prompt import plain_features, prompt_of_row, shared_features
from lit_rlhf.types import Prompts

ROUNDING = 0.05
"""Largest change of a model's output, relative to its size, that rounding explains in any dtype."""

EXACT_ROUNDING = 1e-3
"""The same in float32 and float64."""

ROUNDING_ERRORS = 8
"""The same in units of the dtype's rounding error, for dtypes between the two."""


@torch.no_grad()
def probe_policy(forward: ModelForward) -> None:
    """Set `head_apart` and `shares_prompt` of a causal language model, once."""
    if forward.shares_prompt is not None:
        return
    name = type(forward.model).__name__
    with eval_mode(forward.model), forward.own_precision():
        forward.head_apart = False
        prompts, tokens, expected, noise, change = probe_plain(forward)
        if change:
            rank_zero_warn(
                f"{name} does not ignore padding (its output changes by {change:.0%} with more of it): "
                "give data.batch_size=1, or prompts of one length"
            )
        forward.head_apart = True
        limit = rounding(forward) * rms(expected) + 3 * noise
        reason = fallback_reason(lambda: forward.project(plain_features(forward, prompts, tokens, 2)), expected, limit)
        if reason is None and not logits_are_the_heads(forward, prompts):
            reason = "it scales or caps its logits"
        forward.head_apart = reason is None
        if reason is not None:
            rank_zero_info(f"{name} holds the logits of all positions at once: {reason}")
        owner = prompt_of_row(2, 2)
        reason = fallback_reason(
            lambda: forward.project(shared_features(forward, prompts, tokens, owner)), expected, limit
        )
        forward.shares_prompt = reason is None
        if reason is not None:
            rank_zero_warn(
                f"{name} computes each prompt once per completion, and samples without a cache, which is slow: {reason}"
            )


@torch.no_grad()
def probe_scores(
    forward: ModelForward,
    plain: Callable[[list[list[int]]], Tensor],
    shared: Callable[[Prompts, Tensor, Tensor, list[int]], Tensor],
    name: str,
) -> None:
    """Set `shares_prompt` of a sequence-classification model, once.

    Args:
        forward: The model's forward pass.
        plain: Scores of rows of token ids by the model itself.
        shared: Scores of prompts and completions, given also the prompt and the length of each completion.
        name: Name in messages.
    """
    if forward.shares_prompt is not None:
        return
    if not forward.head_apart:
        forward.shares_prompt = False
        model = type(forward.model).__name__
        rank_zero_info(f"{name} computes each prompt once per completion: a {model} has no linear head called `score`")
        return
    with eval_mode(forward.model), forward.own_precision():
        prompts, tokens = probe_input(forward.vocabulary, forward.device)
        starts = [ids[mask].tolist() for ids, mask in zip(prompts.tokens, prompts.mask, strict=True)]
        rows = [starts[i // 2] + completion for i, completion in enumerate(tokens.tolist())]
        owner, lengths = prompt_of_row(2, 2), [tokens.shape[1]] * len(rows)
        whole, _, features, noise, _ = probe_plain(forward)  # a head of zeros hides what the trunk does
        limit = rounding(forward) * rms(features) + 3 * noise
        reason = fallback_reason(lambda: shared_features(forward, whole, tokens, owner), features, limit)
        expected, alone = plain(rows), torch.cat([plain([row]) for row in rows])
        head = next(forward.head.parameters())
        size = rms(features) * float(head.float().norm())  # of the terms of a score, which may be small itself
        limit = rounding(forward) * size + 3 * rms(expected - alone)
        reason = reason or fallback_reason(lambda: shared(prompts, tokens, owner, lengths), expected, limit)
    forward.shares_prompt = reason is None
    if reason is not None:
        rank_zero_warn(f"{name} computes each prompt once per completion, which is slow: {reason}")


def probe_input(vocabulary: int, device: torch.device) -> tuple[Prompts, Int[Tensor, "rows tokens"]]:
    """Return two prompts, one of them padded, and two completions of each, of arbitrary tokens."""
    ids = torch.arange(3, 29, device=device) * 7919 % vocabulary
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[0, :2] = False
    return Prompts(ids[:10].view(2, 5), mask, torch.arange(2, device=device)), ids[10:].view(4, 4)


def add_padding(prompts: Prompts, columns: int = 3) -> Prompts:
    """Return the same prompts with more padding, which changes a model's output by rounding only."""
    pad = (columns, 0)
    return prompts.replace(
        tokens=nn.functional.pad(prompts.tokens, pad), mask=nn.functional.pad(prompts.mask, pad, value=False)
    )


def probe_plain(forward: ModelForward) -> tuple[Prompts, Tensor, Tensor, float, float]:
    """Compute the features of the probe by the plain path.

    Returns:
        Prompts, completions, their features, the root mean square of how padding changes these, and 0.0. For a model
        whose output depends on its padding: the same without padding, 0.0, and how much padding changes the output,
        relative to its size.
    """
    prompts, tokens = probe_input(forward.vocabulary, forward.device)
    expected = plain_features(forward, prompts, tokens, 2)
    noise = rms(plain_features(forward, add_padding(prompts), tokens, 2) - expected)
    if not noise > ROUNDING * rms(expected):  # NaN is not a matter of padding
        return prompts, tokens, expected, noise, 0.0
    unpadded = prompts.replace(mask=torch.ones_like(prompts.mask))
    return unpadded, tokens, plain_features(forward, unpadded, tokens, 2), 0.0, noise / rms(expected)


def rounding(forward: ModelForward) -> float:
    """Return the largest change of a model's output, relative to its size, that rounding explains.

    The change that padding causes is no measure: in 16 bits it is often exactly 0, where that of another path is not.
    """
    dtypes = {compute_dtype(p) for p in forward.model.parameters() if p.is_floating_point()}
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":  # products of float32 in TF32, which rounds like float16, or in bfloat16
        dtypes.add(torch.float16 if precision == "high" else torch.bfloat16)
    return min(ROUNDING, max(EXACT_ROUNDING, ROUNDING_ERRORS * max(torch.finfo(dtype).eps for dtype in dtypes)))


def fallback_reason(compute: Callable[[], Tensor], expected: Tensor, limit: float) -> str | None:
    """Return why a fast path deviates from the plain one; None if it does not.

    Args:
        compute: The fast path.
        expected: The result of the plain path.
        limit: Largest root mean square of a difference that is rounding.
    """
    if not bool(expected.isfinite().all()):
        return f"its output is not finite in {str(expected.dtype).removeprefix('torch.')}"
    try:
        difference = rms(compute() - expected)
    except Exception as error:  # whatever a model without a cache raises, the plain path remains
        return f"{type(error).__name__}: {error}"
    return None if difference <= limit else f"its output would differ by {difference:.2g}"


def logits_are_the_heads(forward: ModelForward, prompts: Prompts) -> bool:
    """Whether the logits are what the head returns, also where they are large (a cap changes only those)."""
    ramps: list[Tensor] = []

    def ramp(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        row = torch.linspace(-100, 100, output.shape[-1], dtype=output.dtype, device=output.device)
        ramps.append(row.expand_as(output))
        return ramps[-1]

    handle = forward.head.register_forward_hook(ramp)
    try:
        with forward.fast_attention():
            logits = forward.model(input_ids=prompts.tokens, attention_mask=prompts.mask.long()).logits
    finally:
        handle.remove()
    return len(ramps) == 1 and torch.equal(logits, ramps[0].to(logits.dtype))


def rms(tensor: Tensor) -> float:
    """Return the root mean square."""
    return float(tensor.float().square().mean().sqrt())
