"""Online DPO: DPO on pairs of completions that the policy samples itself, ranked by rewards or by a pairwise judge.

Guo et al., 2024, arXiv 2402.04792, section 3. Departure: of more than two completions the best and the worst make the
pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.errors import InputError
from lit_rlhf.evaluation import SymmetricJudge
from lit_rlhf.evaluation.evaluator import make_judge
from lit_rlhf.evaluation.judges import mean_wins
from lit_rlhf.evaluation.metrics import pairwise_accuracy
from lit_rlhf.rewards import RewardShaping
from lit_rlhf.training import method_checks
from lit_rlhf.training.distributed import raise_on_all_ranks
from lit_rlhf.training.dynamic_sampling import DynamicSampling
from lit_rlhf.types import Metrics, Prompts, Rollout


@dataclass
class RankedRollout(Rollout):
    """A rollout whose completions are ranked.

    Attributes:
        ranking: The numbers that rank the completions of a prompt, the higher the better; None until they are known.
    """

    ranking: Float[Tensor, "prompts samples"] | None = None


class OnlineDPO(OnlineAlgorithm):
    """Online DPO: loss `-log sigmoid(beta * margin)` of the best and the worst completion of each prompt.

    The margin is `log pi(best) / ref(best) - log pi(worst) / ref(worst)`. A prompt whose completions are all alike is
    left out.

    Args:
        *args: See `OnlineAlgorithm`; `num_samples` is at least 2.
        beta: Strength of the KL constraint, typically 0.05 to 0.5.
        ranking_judge: A pairwise judge that ranks by the share of the other completions that one beats, asked in both
            orders; by default the return ranks.
        kl_coef: The KL is in the loss already, so it is not in the return.
        **kwargs: See `OnlineAlgorithm`.

    Raises:
        ValueError: If a number is out of its range or has no effect, or there is no reference.
    """

    rollout_type = RankedRollout
    weighs_advantages = False
    min_samples = 2

    def __init__(
        self,
        *args: Any,
        beta: float = 0.1,
        ranking_judge: Callable[..., Any] | None = None,
        kl_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, kl_coef=kl_coef, **kwargs)
        method_checks.check_beta(beta)
        if self.reference_source is None:
            raise InputError("OnlineDPO compares the policy with a reference, so reference can't be null")
        method_checks.check_whole_groups("OnlineDPO", self.updates.sample_minibatches)
        self.beta, self.learns_from_rewards = beta, ranking_judge is None
        self.ranking_judge: SymmetricJudge | None = None
        if ranking_judge is not None:
            check_what_a_judge_ignores(kl_coef, self.shaping, self.dynamic_sampling)
            self.ranking_judge = pair_judge(ranking_judge)

    def setup(self, stage: str) -> None:
        """Check the configuration, and that the data have the columns that the judge reads."""
        super().setup(stage)
        columns = getattr(self.data_module, "columns", None)
        if self.ranking_judge is not None and stage == "fit" and callable(columns):
            self.ranking_judge.check(columns("train") or ())

    def setup_models(self) -> None:
        """Set up the judge, too."""
        super().setup_models()
        if self.ranking_judge is not None:
            self.ranking_judge.setup(self.device)

    def collect(self, prompts: Prompts) -> Rollout:
        """Collect a rollout, and rank its completions."""
        rollout = super().collect(prompts)
        assert isinstance(rollout, RankedRollout)
        ranking = rollout.total_returns
        if self.ranking_judge is not None:
            with self.timer("score"), raise_on_all_ranks(self.trainer):
                ranking = mean_wins(self.ranking_judge, prompts, rollout.texts, self.trainer_state()).to(ranking)
        return rollout.replace(ranking=ranking)

    def advantages(self, rollout: Rollout) -> Tensor:
        """1 for the best completion of each prompt, -1 for the worst, and 0 for the others."""
        assert isinstance(rollout, RankedRollout) and rollout.ranking is not None
        ranked = rollout.valid & ~rollout.ranking.isnan()
        best, worst = (F.best_of_group_mask(sign * rollout.ranking, ranked) for sign in (1, -1))
        return best.to(rollout.returns) - worst.to(rollout.returns)

    def evaluate(self, part: Rollout) -> Rollout:
        """Evaluate the two completions of each pair only."""
        assert part.advantages is not None
        pair = part.pick(torch.stack([part.advantages.argmax(1), part.advantages.argmin(1)], 1))
        assert pair.advantages is not None
        differ = (pair.advantages[:, :1] > 0) & (pair.advantages[:, 1:] < 0)
        return super().evaluate(pair.replace(valid=pair.valid & differ).trim())

    def loss(self, part: Rollout) -> tuple[Tensor, Metrics]:
        """DPO loss of each pair, for both of its completions."""
        assert part.logprobs is not None and part.reference_logprobs is not None
        log_ratios = F.masked_sum(part.logprobs - part.reference_logprobs, part.completions.mask)
        margin, counted = log_ratios[:, 0] - log_ratios[:, 1], part.valid[:, 0]
        metrics: Metrics = {
            "accuracy": (pairwise_accuracy(*log_ratios.detach().unbind(1)[:2]), counted),
            "reward_margin": (self.beta * margin.detach(), counted),
        }
        return F.dpo_loss(margin, self.beta).unsqueeze(1).expand_as(part.valid), metrics


def check_what_a_judge_ignores(kl_coef: float, shaping: RewardShaping, dynamic_sampling: DynamicSampling) -> None:
    """Check that no option is given that changes rewards, or chooses by them, where a judge ranks."""
    if kl_coef or replace(shaping, mask_truncated_completions=False) != RewardShaping():
        raise InputError("the ranking_judge ranks, not the return: kl_coef and shaping of rewards have no effect")
    if dynamic_sampling.reward is not None:
        raise InputError("the ranking_judge ranks, and dynamic_sampling would leave prompts out by a reward: drop one")


def pair_judge(judge: Callable[..., Any]) -> SymmetricJudge:
    """Return a pairwise judge, asked in both orders."""
    made = make_judge(judge)
    if not isinstance(made, SymmetricJudge):
        raise InputError("the ranking_judge has to compare two completions, with the attribute `pairwise = True`")
    return made
