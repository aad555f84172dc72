"""REINFORCE++: the clipped token ratio of PPO, with advantages that are normalized over the whole batch, not the group.

Hu et al., 2025, arXiv 2501.03262, section 3: REINFORCE++ for one completion per prompt, and its variant with the mean
of a group as the baseline. Departure of the variant: the k2 loss is that of whole completions, over their length; the
paper's is per token.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.training.normalization import whiten_over_ranks
from lit_rlhf.types import Rollout


class ReinforcePlusPlus(GRPO):
    """REINFORCE++: `A_t = r - beta * sum_{s >= t} k1_s`, normalized over the batch; GRPO's loss without a KL term.

    Args:
        *args: See `GRPO`; `num_samples` may be 1.
        kl_penalty: See `OnlineAlgorithm`.
        **kwargs: See `GRPO`.
    """

    published_kl_penalty = "k1_reward"
    min_samples = 1
    group_baseline = False

    def __init__(self, *args: Any, kl_penalty: str = "k1_reward", **kwargs: Any) -> None:
        super().__init__(*args, kl_penalty=kl_penalty, advantage_std="batch", **kwargs)

    def advantages(self, rollout: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """Reward-to-go of each token including its KL, normalized over all tokens of all ranks."""
        rewards = F.token_rewards_with_kl(rollout.rewards, self.token_penalties(rollout), rollout.completions.mask)
        to_go = F.reward_to_go(rewards, rollout.completions.mask)
        return whiten_over_ranks(to_go, rollout.loss_mask, self.sum_over_ranks)


class ReinforcePlusPlusBaseline(GRPO):
    """REINFORCE++ with a group baseline: `A_i = R_i - mean` of the group, normalized over the batch; k2 in the loss.

    It is `GRPO` with `advantage_std="batch"` and `kl_penalty="k2_loss"`.

    Args:
        *args: See `GRPO`.
        kl_penalty: See `OnlineAlgorithm`.
        **kwargs: See `GRPO`.
    """

    published_kl_penalty = "k2_loss"

    def __init__(self, *args: Any, kl_penalty: str = "k2_loss", **kwargs: Any) -> None:
        super().__init__(*args, kl_penalty=kl_penalty, advantage_std="batch", **kwargs)
