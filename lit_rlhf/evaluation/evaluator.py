"""Evaluation of a policy on held-out prompts: rewards, KL, win rate, diversity, perplexity."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase, TrainerState

from lit_rlhf import functional as F
from lit_rlhf.errors import InputError
from lit_rlhf.evaluation.completions import check_lengths, column_completions, completion_texts
from lit_rlhf.evaluation.judges import SymmetricJudge
from lit_rlhf.evaluation.metrics import DistinctN, Moments, Perplexity, WinRate
from lit_rlhf.evaluation.options import EvaluationOptions
from lit_rlhf.evaluation.scoring import score
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference
from lit_rlhf.models.sampling import Sampler, Sampling
from lit_rlhf.rewards import Guarded, Scorer, Scores, Weighted
from lit_rlhf.types import Completions, Prompts, Text

M = TypeVar("M", bound=Metric)

VALIDATION_EPOCH = 2**31
"""Epoch in the counter of validation's sampling noise: the same at every validation, and never one of training's."""

NUM_EXAMPLES = 8


def make_judge(judge: Callable[..., Any]) -> Scorer | SymmetricJudge:
    """Wrap a judge that scores one completion, or one that compares two."""
    bare = judge
    while isinstance(bare, Weighted | Guarded):
        bare = bare.reward
    pairwise = getattr(bare, "pairwise", getattr(getattr(bare, "func", None), "pairwise", False))
    return SymmetricJudge(judge) if pairwise else Scorer([judge], "judge")


def check_opponent(judge: Scorer | SymmetricJudge, options: EvaluationOptions, has_reference: bool) -> None:
    """Check that a judge of pairs has an opponent.

    Raises:
        ValueError: If that would be the reference, and there is none.
    """
    if isinstance(judge, SymmetricJudge) and options.compare_to == "policy" and not has_reference:
        raise InputError(
            "evaluation.judge compares with completions of the reference, and reference is null: give a column of "
            "completions as evaluation.compare_to"
        )


class Evaluator:
    """Evaluates a policy on held-out prompts, batch by batch.

    Rewards, lengths, diversity and the win rate are those of greedy completions (or the best of n), the KL is that of
    sampled ones, the perplexity that of given ones. Completions of the opponent are cached by prompt.

    Args:
        policy: The policy to evaluate.
        reference: The reference policy of the KL, and the opponent if `options.compare_to` is `policy`; without it
            neither the KL nor such a win rate is measured.
        tokenizer: The policy's tokenizer.
        scorer: The rewards.
        judge: Decides the win rate; the scorer itself if there is no other.
        options: What else to measure.
        sampling: Options of sampling.
        seed: The run's seed, for the KL's samples.
        sampler: Samples from the policy; the policy itself by default.
        together: Makes a context in which an error of one rank is raised on all. Rewards, judges and columns run in it,
            since the other ranks would wait in the next pass of a sharded model.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer,
        judge: Scorer | SymmetricJudge,
        options: EvaluationOptions,
        sampling: Sampling,
        seed: int,
        sampler: Sampler | None = None,
        together: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.together, self.sampler = together, sampler or policy
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer
        self.scorer, self.judge, self.options, self.seed = scorer, judge, options, seed
        self.greedy = dataclasses.replace(sampling, greedy=True)
        self.sampled = dataclasses.replace(sampling, greedy=False)
        self.examples: list[dict[str, Any]] = []
        self._opponents: dict[int, Any] = {}  # by prompt index: completion, with its score if the judge scores
        self._opponent_weights: list[float] = []

    @torch.inference_mode(False)
    def start(self, updates: int) -> None:
        """Reset the metrics, and drop cached opponent scores that are no longer comparable.

        Args:
            updates: Updates of the policy so far, which the weights of rewards may depend on.
        """
        self.examples = []
        names = ["reward", *[f"reward/{name}" for name in self.scorer.names], "length", "eos_rate", "undecided"]
        if self.reference is not None:
            names.append("kl")
        if isinstance(self.judge, SymmetricJudge):
            names.append("position_bias")
        elif self.judge is not self.scorer:
            names.append("judge")
        self.moments = {name: self._metric(Moments()) for name in names}
        self.win_rate = self._metric(WinRate())
        self.distinct = {n: self._metric(DistinctN(n)) for n in (1, 2)}
        self.perplexity = None if self.options.preferred is None else self._metric(Perplexity())
        weights = self.judge.weights(updates)
        if weights != self._opponent_weights or self.judge.follows_training:
            self._opponents, self._opponent_weights = {}, weights

    def _metric(self, metric: M) -> M:
        return metric.to(F.float64_device(next(self.policy.parameters()).device))

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, prompts: Prompts, state: TrainerState) -> None:
        """Evaluate a batch of prompts."""
        completions = self.complete(prompts, state)
        texts = completion_texts(self.tokenizer, prompts, completions)
        scores = self._score(self.scorer, prompts, completions, texts, state)
        totals, valid = scores.total()[:, 0], scores.valid[:, 0]
        self.moments["reward"].update(totals[valid])
        for name, values in scores.component_rewards.items():
            self.moments[f"reward/{name}"].update(values[~values.isnan()])
        kl = None
        if self.reference is not None:
            kl = self.kl(self.reference, prompts)
            self.moments["kl"].update(kl)
        self.moments["length"].update(completions.lengths[:, 0])
        self.moments["eos_rate"].update(completions.finished[:, 0])
        for distinct in self.distinct.values():
            distinct.update(completions.ids())
        if self.perplexity is not None:
            self._update_perplexity(self.perplexity, prompts)
        first = [row[0] for row in texts]
        self._compare(prompts, completions, first, totals, state)
        self._keep_examples(prompts, completions, first, scores, kl)

    def complete(self, prompts: Prompts, state: TrainerState) -> Completions:
        """Return the completions to evaluate, one per prompt: greedy, or the best of n samples."""
        if self.options.best_of == 1:
            return self.sampler.sample(prompts, 1, self.greedy)
        sampled = self.sampler.sample(prompts, self.options.best_of, self.sampled, self.seed, VALIDATION_EPOCH)
        texts = completion_texts(self.tokenizer, prompts, sampled)
        totals = self._score(self.scorer, prompts, sampled, texts, state).total()
        best = totals.nan_to_num(-torch.inf).argmax(1)
        return sampled.map(lambda tensor: tensor[torch.arange(len(best), device=best.device), best].unsqueeze(1))

    def kl(self, reference: Reference, prompts: Prompts) -> Float[Tensor, " prompts"]:
        """Estimate KL(policy || reference) of each prompt by one sample, in nats per completion."""
        sampled = self.sampler.sample(prompts, 1, self.sampled, self.seed, VALIDATION_EPOCH)
        theirs = reference.logprobs(prompts, sampled, self.sampled.temperature)
        k1 = F.masked_sum(F.kl_k1(sampled.logprobs, theirs), sampled.mask)[:, 0]
        return k1 + F.best_of_kl(self.options.best_of)

    def _score(
        self, scorer: Scorer, prompts: Prompts, completions: Completions, texts: list[list[Text]], state: TrainerState
    ) -> Scores:
        with self.together():
            return score(scorer, self.tokenizer, prompts, completions, texts, state)

    def _update_perplexity(self, perplexity: Perplexity, prompts: Prompts) -> None:
        assert self.options.preferred is not None
        with self.together():
            given = column_completions(self.tokenizer, prompts, self.options.preferred)[1]
            check_lengths(self.policy.causal_lm.config, prompts, given, self.options.preferred)
        perplexity.update(self.policy.logprobs(prompts, given), given.mask)

    def _keep_examples(
        self, prompts: Prompts, completions: Completions, texts: list[Text], scores: Scores, kl: Tensor | None
    ) -> None:
        totals = scores.total()
        for i in range(min(len(prompts), NUM_EXAMPLES - len(self.examples))):
            self.examples.append(
                {
                    "prompt": prompts.text[i],
                    "completion": texts[i],
                    "reward": float(totals[i, 0]),
                    "component_rewards": {name: float(v[i, 0]) for name, v in scores.component_rewards.items()},
                    "kl": None if kl is None else float(kl[i]),
                    "length": int(completions.lengths[i, 0]),
                    "finished": bool(completions.finished[i, 0]),
                }
            )

    # Win rate

    def _compare(
        self, prompts: Prompts, completions: Completions, texts: list[Text], totals: Tensor, state: TrainerState
    ) -> None:
        """Update the win rate against the opponent; a tie is half a win, NaN is undecided."""
        if isinstance(self.judge, SymmetricJudge):
            wins = self._compare_pairs(self.judge, prompts, texts, state)
        else:
            own = totals
            if self.judge is not self.scorer:
                nested = [[text] for text in texts]
                own = self._score(self.judge, prompts, completions, nested, state).total()[:, 0]
                self.moments["judge"].update(own[~own.isnan()])
            no_opponent = self.reference is None and self.options.compare_to == "policy"
            wins = own[:0] if no_opponent else self._compare_scores(prompts, texts, own, state)
        decided = ~wins.isnan()
        self.win_rate.update(wins[decided])
        self.moments["undecided"].update(~decided)

    def _compare_scores(self, prompts: Prompts, texts: list[Text], own: Tensor, state: TrainerState) -> Tensor:
        """Return whether each completion has a higher score than the opponent's, 0.5 for a tie."""
        opponents = self._cached(prompts, lambda: self._scored_opponents(prompts, state))
        theirs = torch.tensor([number for _, number in opponents], dtype=own.dtype, device=own.device)
        # a reward model may score the same text differently by rounding, depending on the batch
        same = [text == other for text, (other, _) in zip(texts, opponents, strict=True)]
        tie = (own == theirs) | torch.tensor(same, device=own.device)
        return torch.where(tie, 0.5, (own > theirs).float()).where(~(own.isnan() | theirs.isnan()), torch.nan)

    def _compare_pairs(
        self, judge: SymmetricJudge, prompts: Prompts, texts: list[Text], state: TrainerState
    ) -> Float[Tensor, " prompts"]:
        """Return the win probability of each completion, NaN if there is no opponent or no decision."""
        opponents = self._cached(prompts, lambda: self._opponent_texts(prompts))
        pairs = [i for i, text in enumerate(opponents) if text is not None]
        wins, bias = torch.full((len(texts),), torch.nan, dtype=torch.float32), torch.zeros(0)
        columns = {name: [column[i] for i in pairs] for name, column in prompts.columns.items()}
        compared = ([prompts.text[i] for i in pairs], [texts[i] for i in pairs], [opponents[i] for i in pairs])
        with self.together():
            if pairs:
                wins[pairs], bias = judge(*compared, columns, state)
        self.moments["position_bias"].update(bias[~bias.isnan()])
        return wins

    def _cached(self, prompts: Prompts, make: Callable[[], list[Any]]) -> list[Any]:
        """Return what `make` computes about the opponent's completions, once per prompt."""
        index = prompts.index.tolist()
        if any(i not in self._opponents for i in index):
            self._opponents.update(zip(index, make(), strict=True))
        return [self._opponents[i] for i in index]

    def _scored_opponents(self, prompts: Prompts, state: TrainerState) -> list[tuple[Text, float]]:
        """Return the opponent's completions and the judge's scores, NaN for a missing completion."""
        assert isinstance(self.judge, Scorer)
        texts, theirs = self._opponent(prompts)
        totals = self._score(self.judge, prompts, theirs, [[text] for text in texts], state).total()[:, 0]
        return list(zip(texts, totals.where(theirs.mask[:, 0].any(-1), torch.nan).tolist(), strict=True))

    def _opponent_texts(self, prompts: Prompts) -> list[Text | None]:
        """Return the opponent's completions, None for a missing one."""
        texts, theirs = self._opponent(prompts)
        given = theirs.mask[:, 0].any(-1).tolist()
        return [text if exists else None for text, exists in zip(texts, given, strict=True)]

    def _opponent(self, prompts: Prompts) -> tuple[list[Text], Completions]:
        if self.options.compare_to != "policy":
            with self.together():
                return column_completions(self.tokenizer, prompts, self.options.compare_to)
        assert self.reference is not None
        theirs = self.reference.sample(prompts, 1, self.greedy)
        return [row[0] for row in completion_texts(self.tokenizer, prompts, theirs)], theirs

    def compute(self, kl_coef: float) -> dict[str, float]:
        """Return all metrics over all ranks; metrics without any value are left out.

        Args:
            kl_coef: Coefficient of the KL in the return.
        """
        moments = {name: moments.compute() for name, moments in self.moments.items()}
        penalty = kl_coef * moments["kl"][0] if "kl" in moments else 0.0
        rate, low, high = self.win_rate.compute()
        measured = {
            **{name: mean for name, (mean, _) in moments.items()},
            "return": moments["reward"][0] - penalty,
            "reward_variance": moments["reward"][1],
            "win_rate": rate,
            "win_rate_low": low,
            "win_rate_high": high,
            **{f"distinct_{n}": distinct.compute() for n, distinct in self.distinct.items()},
        }
        if self.perplexity is not None:
            measured["perplexity"] = self.perplexity.compute()
        return {name: float(value) for name, value in measured.items() if not value.isnan()}
