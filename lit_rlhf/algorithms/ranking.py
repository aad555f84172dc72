"""Base of the methods that learn from a ranking of sampled completions, by rewards or by a pairwise judge."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.errors import InputError
from lit_rlhf.evaluation import SymmetricJudge
from lit_rlhf.evaluation.evaluator import make_judge
from lit_rlhf.evaluation.judges import mean_wins
from lit_rlhf.rewards import RewardShaping
from lit_rlhf.training import method_checks
from lit_rlhf.training.distributed import raise_on_all_ranks
from lit_rlhf.training.dynamic_sampling import DynamicSampling
from lit_rlhf.types import Prompts, Rollout


@dataclass
class RankedRollout(Rollout):
    """A rollout whose completions are ranked.

    Attributes:
        ranking: The numbers that rank the completions of a prompt, the higher the better; minus infinity without
            a reward or an opinion of the judge; None until they are known.
    """

    ranking: Float[Tensor, "prompts samples"] | None = None


class RankingAlgorithm(OnlineAlgorithm):
    """An algorithm that learns from a ranking of the completions of each prompt, in `rollout.ranking`.

    Args:
        *args: See `OnlineAlgorithm`; `num_samples` is at least 2.
        ranking_judge: A pairwise judge that ranks by the share of the other completions that one beats, asked in both
            orders; by default the return ranks. Beside a judge, rewards are only logged; `Zero` is a placeholder.
        kl_coef: See `OnlineAlgorithm`.
        **kwargs: See `OnlineAlgorithm`.

    Raises:
        ValueError: If an option has no effect, or the judge compares no pairs.
    """

    rollout_type = RankedRollout
    weighs_advantages = False
    min_samples = 2
    group_baseline = True

    def __init__(
        self, *args: Any, ranking_judge: Callable[..., Any] | None = None, kl_coef: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, kl_coef=kl_coef, **kwargs)
        method_checks.check_whole_groups(type(self).__name__, self.updates.sample_minibatches)
        self.learns_from_rewards = ranking_judge is None
        self.ranking_judge: SymmetricJudge | None = None
        if ranking_judge is not None:
            kl_in_reward = kl_coef if self.kl_place == "reward" else 0.0
            check_what_a_judge_ignores(kl_in_reward, self.shaping, self.dynamic_sampling)
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
            ranking = ranking.nan_to_num(-math.inf)
        return rollout.replace(ranking=ranking.masked_fill(~rollout.valid, -math.inf))

    def prepare(self, rollout: Rollout) -> Rollout:
        """Leave out completions without a rank."""
        assert isinstance(rollout, RankedRollout) and rollout.ranking is not None
        return super().prepare(rollout.replace(valid=rollout.valid & ~rollout.ranking.isneginf()))


def check_what_a_judge_ignores(kl_in_reward: float, shaping: RewardShaping, dynamic_sampling: DynamicSampling) -> None:
    """Check that no option is given that changes rewards, or chooses by them, where a judge ranks."""
    if kl_in_reward:
        raise InputError(
            f"the ranking_judge ranks, not the return: kl_coef={kl_in_reward} in the reward has no effect; set it to 0"
        )
    if replace(shaping, mask_truncated_completions=False) != RewardShaping():
        raise InputError("the ranking_judge ranks, not the return: shaping of rewards has no effect; leave it out")
    if dynamic_sampling.reward is not None:
        raise InputError("the ranking_judge ranks, and dynamic_sampling would leave prompts out by a reward: drop one")


def pair_judge(judge: Callable[..., Any]) -> SymmetricJudge:
    """Return a pairwise judge, asked in both orders."""
    made = make_judge(judge)
    if not isinstance(made, SymmetricJudge):
        raise InputError("the ranking_judge has to compare two completions, with the attribute `pairwise = True`")
    return made
