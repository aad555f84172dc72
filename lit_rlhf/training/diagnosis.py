"""Signs of a run that learns nothing. Each gives one warning, once, with the number and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.types import Rollout

PATIENCE = 3
"""Rollouts, or updates, that must show a sign."""
MIN_EOS_RATE = 0.05
"""Share of finished completions below which nothing seems to finish."""
MIN_MOVED = 0.01
"""Share of the weights with a gradient that an update must change."""
SAMPLE = 64
"""Weights of each parameter that are compared."""
UPDATES_WITHOUT_KL = 5
"""Updates after which the policy must differ from the reference."""
SAME_LOGPROBS = 2e-6
"""Mean difference in nats per token that rounding explains; an update in float32 gives 1e-5 or more."""


@dataclass
class MovementCheck:
    """Whether updates change the weights, measured on a sample of them until that is known.

    Attributes:
        unmoved: Updates so far that changed nothing.
        done: Whether the answer is known.
    """

    unmoved: int = 0
    done: bool = False

    @property
    def nothing_moves(self) -> bool:
        """Whether a warning has said so."""
        return self.unmoved == PATIENCE

    def before(self, optimizer: Optimizer | LightningOptimizer) -> list[Tensor]:
        """Return a sample of the weights before an update."""
        return [] if self.done else [sample(p).clone() for p in parameters(optimizer)]

    def after(self, optimizer: Optimizer | LightningOptimizer, before: list[Tensor]) -> None:
        """Compare with the weights after the update. Gradients that are 0, and a warm-up's first half, don't count."""
        group = optimizer.param_groups[0]
        if self.done or not before:
            return
        counts = torch.zeros(2)
        for weights, previous in zip(parameters(optimizer), before, strict=True):
            if weights.grad is not None and weights.grad.shape == weights.shape:
                gradient = sample(weights.grad)
                pulled = gradient.isfinite() & (gradient != 0)
                moved = pulled & (sample(weights) != previous)
                counts += torch.stack([moved.sum(), pulled.sum()]).float().cpu()
        moved_share = float(counts[0] / counts[1]) if counts[1] else 1.0
        self.done = bool(counts[1]) and moved_share >= MIN_MOVED
        if self.done or not counts[1] or group["lr"] < group.get("initial_lr", 0.0) / 2:
            return
        self.unmoved += 1
        if self.nothing_moves:
            self.done = True
            dtype = str(next(iter(parameters(optimizer))).dtype).removeprefix("torch.")
            hint = "" if dtype == "float32" else f", or train in float32: {dtype} rounds small steps away"
            rank_zero_warn(
                f"{PATIENCE} updates with a learning rate of {group['lr']:g} changed {moved_share:.1%} of the weights "
                f"that have a gradient: nothing is learned; raise model.optimizer.lr{hint}"
            )


@dataclass
class RolloutDiagnosis:
    """What the first rollouts of a run show.

    Attributes:
        rollouts: Number of rollouts so far.
        completions: Number of completions in them.
        finished: Number of completions that ended by themselves.
        compares_groups: Whether the method compares the completions of one prompt, not those of all rollouts.
        varied: Number of groups with more than one reward; without groups, whether any two completions differ.
        lowest: Lowest reward so far.
        highest: Highest reward so far.
        has_teacher: Whether the policy learns from something else, whatever the rewards are: a KL to another model, or
            a judge.
        hopeless: Whether a warning has already explained why the policy stays as it is.
        kl_known: Whether the KL to the reference has been seen or found missing, or there is no reference.
    """

    rollouts: int = 0
    completions: int = 0
    finished: int = 0
    compares_groups: bool = True
    varied: int = 0
    lowest: float = math.inf
    highest: float = -math.inf
    hopeless: bool = False
    has_teacher: bool = False
    kl_known: bool = False

    @property
    def done(self) -> bool:
        """Whether no more rollouts are needed."""
        return self.rollouts >= PATIENCE and self.kl_known

    def add(
        self,
        ranks: Iterable[Mapping[str, float]],
        updates: int,
        max_new_tokens: int,
        rate: float,
        warms_up: bool = False,
    ) -> None:
        """Add a rollout and warn about what it completes.

        Args:
            ranks: `rollout_facts` of each rank.
            updates: Updates of the run before the rollout.
            max_new_tokens: Maximum length of a completion; 0 if completions are not expected to end before that.
            rate: The learning rate.
            warms_up: Whether it is still below half of what it grows to, so that updates may be too small to see.
        """
        ranks = list(ranks)
        total = {name: sum(rank[name] for rank in ranks) for name in ranks[0]}
        self.lowest = min(self.lowest, *(rank["lowest"] for rank in ranks))
        self.highest = max(self.highest, *(rank["highest"] for rank in ranks))
        grouped = self.compares_groups and bool(total["groups"])
        self.rollouts += 1
        self.completions += int(total["completions"])
        self.finished += int(total["finished"])
        self.varied += int(total["varied_groups"] if grouped else self.highest > self.lowest)
        if self.rollouts == PATIENCE:
            self._check_eos(max_new_tokens)
            self._check_rewards(grouped)
        if not self.kl_known:
            difference = total["difference"] / max(1.0, total["tokens"])
            self._check_kl(difference, 0 if warms_up else updates, rate)

    def _check_eos(self, max_new_tokens: int) -> None:
        if max_new_tokens and self.finished < MIN_EOS_RATE * self.completions:
            rank_zero_warn(
                f"{self.finished} of the first {self.completions} completions ended within "
                f"sampling.max_new_tokens={max_new_tokens}, the others were cut: raise it if they are meant to end"
            )

    def _check_rewards(self, grouped: bool) -> None:
        if self.varied or self.has_teacher:
            return
        self.hopeless = True
        same = "of a prompt had the same reward as the others" if grouped else "had the same reward"
        rank_zero_warn(
            f"each of the first {self.completions} completions {same}: there is nothing to learn from; check the "
            "reward, give easier prompts, or raise num_samples or sampling.temperature"
        )

    def _check_kl(self, difference: float, updates: int, rate: float) -> None:
        self.kl_known = updates > 0 and difference > SAME_LOGPROBS
        if self.kl_known or updates < UPDATES_WITHOUT_KL:
            return
        self.kl_known = True
        if not self.hopeless:
            rank_zero_warn(
                f"the KL to the reference is 0 after {updates} updates: either a learning rate of {rate:g} is too low "
                "(raise model.optimizer.lr), or the reference was read from a folder that now holds the trained policy "
                "(give the policy that the run started from)"
            )


def rollout_facts(rollout: Rollout) -> dict[str, float]:
    """Return what `RolloutDiagnosis` needs of a rank's rollout."""
    completions, valid, rewards = rollout.completions, rollout.valid, rollout.total_rewards
    highest = rewards.masked_fill(~valid, -torch.inf).amax(1)
    lowest = rewards.masked_fill(~valid, torch.inf).amin(1)
    groups = valid.sum(1) > 1
    reference = completions.logprobs if rollout.reference_logprobs is None else rollout.reference_logprobs
    difference = (completions.logprobs - reference).abs().masked_fill(~completions.mask, 0.0)
    facts = {
        "completions": torch.tensor(valid.numel()),
        "finished": completions.finished.sum(),
        "groups": groups.sum(),
        "varied_groups": (groups & (highest > lowest)).sum(),
        "highest": highest.max(),
        "lowest": lowest.min(),
        "tokens": completions.mask.sum(),
        "difference": difference.sum(),
    }
    return dict(zip(facts, torch.stack([value.to(rewards) for value in facts.values()]).tolist(), strict=True))


def parameters(optimizer: Optimizer | LightningOptimizer) -> list[Any]:
    """Return the plain parameters of an optimizer; sharded ones are left out."""
    found = [p for group in optimizer.param_groups for p in group["params"]]
    return [p for p in found if type(p.data) is Tensor and p.numel()]


def sample(tensor: Tensor) -> Tensor:
    """Return some of the elements, at regular distances."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)]


def check_chat_prompts(tokenizer: PreTrainedTokenizerBase, data: Any, stage: str) -> bool:
    """Return whether a model with a chat template is trained on plain text that has not been rendered with one.

    That gives a warning, unless the data's transform has an attribute `continues_text = True`.
    """
    rows = getattr(data, "train_set", None)
    if stage != "fit" or not rows or not tokenizer.chat_template:
        return False
    texts = [row.example.prompt for row in rows[list(range(min(16, len(rows))))]]
    if not all(isinstance(text, str) and text and not is_rendered(tokenizer, text) for text in texts):
        return False
    if not getattr(getattr(data, "transform", None), "continues_text", False):
        rank_zero_warn(
            f"the prompts are plain text, such as {texts[0][:40]!r}, and the tokenizer has a chat template: the model "
            "will continue the text; to have it answer, give messages, such as [{'role': 'user', 'content': TEXT}]"
        )
    return True


def is_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether a text holds a special token, or what opens a user's turn in the chat template."""
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if len(str(token)) > 2]
    try:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "@@"}], tokenize=False)
    except Exception:  # any that a template may raise
        rendered = ""
    opening = str(rendered).partition("@@")[0].removeprefix(tokenizer.bos_token or "").split()
    return any(token in text for token in [*specials, *opening[-1:]])
