"""Checks of a method's options, of the column that it reads, and of what its functions return."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import Tensor

from lit_rlhf.errors import InputError
from lit_rlhf.types import Metrics, Rollout


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Check that an option is one of its values."""
    if value not in choices:
        raise InputError(f"{name}={value!r} must be one of {', '.join(choices)}")


def check_beta(beta: float) -> None:
    """Check the strength of the KL constraint of a loss on pairs or labels."""
    if not 0 < beta < math.inf:
        raise InputError(f"beta={beta} must be a finite number above 0")


def check_weight(name: str, value: float) -> None:
    """Check the weight of a kind of completions."""
    if not 0 < value < math.inf:
        raise InputError(f"{name}={value} must be a number above 0")


def check_clip_range(low: float | None, high: float | None = None) -> None:
    """Check the bounds of a clipped ratio."""
    for name, value in {"clip_range": low, "clip_range_high": high}.items():
        if value is not None and not value > 0:
            raise InputError(f"{name}={value} must be above 0, or null for none")
    if low is not None and low >= 1:
        raise InputError(
            f"clip_range={low} is no lower bound, since every ratio is above 0: choose one below 1, or null for none"
        )


def check_whole_groups(algorithm: str, sample_minibatches: int) -> None:
    """Check that groups are not split, for a method that chooses completions by comparing them."""
    if sample_minibatches > 1:
        raise InputError(
            f"{algorithm} trains on completions chosen from the whole group, which "
            f"sample_minibatches={sample_minibatches} can't split: use num_minibatches"
        )


def read_label(value: Any) -> bool | None:
    """Return a label, true or false, or 1 or 0, also as the text of a csv file; None if it is something else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if value in (True, False) else None


def check_row_losses(function: str, terms: Any, rows: int) -> None:
    """Check that a function of an offline algorithm returns one loss per row, not their mean."""
    if not isinstance(terms, Tensor) or terms.shape != (rows,):
        raise InputError(f"{function} must return one loss per row, of shape ({rows},), not {describe(terms)}")


def check_label(algorithm: str, columns: dict[str, Any], name: str, row: str) -> None:
    """Check that a row has a label that `read_label` reads."""
    if name not in columns:
        found = sorted(columns) or "no columns"
        raise InputError(f"{algorithm} reads the column {name!r}, and {row} has {found}: give it")
    if read_label(columns[name]) is None:
        raise InputError(f"{row}: {name}={columns[name]!r} must be true or false")


def check_advantages(algorithm: str, advantages: Any, rollout: Rollout) -> None:
    """Check that an algorithm returns one advantage per completion or per token."""
    shapes = (rollout.rewards.shape, rollout.completions.tokens.shape)
    if not isinstance(advantages, Tensor) or advantages.shape not in shapes:
        raise InputError(
            f"{algorithm}.advantages must return numbers of shape {tuple(shapes[0])} or {tuple(shapes[1])}, not "
            f"{describe(advantages)}"
        )


def check_loss(algorithm: str, result: Any, part: Rollout) -> tuple[Tensor, Metrics]:
    """Return what an algorithm's loss returns: terms per completion or per token, not their mean, and metrics."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise InputError(f"{algorithm}.loss must return its terms and a dict of metrics, not {describe(result)}")
    terms, metrics = result
    shapes = (part.valid.shape, part.loss_mask.shape)
    if not isinstance(terms, Tensor) or terms.shape not in shapes:
        raise InputError(
            f"{algorithm}.loss must return terms of shape {tuple(shapes[0])} or {tuple(shapes[1])}, one per completion "
            f"or one per token, not {describe(terms)}: the base takes the mean"
        )
    for name, value in metrics.items():
        masked = isinstance(value, tuple) and len(value) == 2 and all(isinstance(item, Tensor) for item in value)
        if masked and value[0].shape != value[1].shape:
            found = " and ".join(map(describe, value))
            raise InputError(f"{algorithm}.loss: the metric {name!r} needs values and a mask of one shape, not {found}")
        if not (masked or isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)):
            raise InputError(
                f"{algorithm}.loss: the metric {name!r} must be a number, or values and a mask, not {describe(value)}"
            )
    return terms, metrics


def describe(value: Any) -> str:
    """Return the shape of a tensor, or the type of something else."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_kl_in_loss(algorithm: str, possible: bool) -> None:
    """Check that a KL can be added to the loss terms."""
    if not possible:
        raise InputError(
            f"{algorithm} can't take the KL into its loss: use kl_penalty='k1_reward', or let loss return "
            "self.reduce_tokens(terms, part)"
        )


def check_same_shape(algorithm: str, part: Rollout, evaluated: Rollout) -> None:
    """Check that `evaluate` of an algorithm with an importance ratio keeps every completion of the minibatch."""
    before, after = part.completions.mask.shape, evaluated.completions.mask.shape
    if before != after:
        raise InputError(
            f"{algorithm}.evaluate turns completions of shape {tuple(before)} into {tuple(after)}: with an importance "
            "ratio it must keep them all"
        )
