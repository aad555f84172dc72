"""ReMax: REINFORCE whose baseline is the reward of the greedy completion.

Li et al., 2023, arXiv 2310.10505, section 4. Departures: none; the greedy completion is decoded in the same batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lit_rlhf.algorithms.policy_gradient import PolicyGradient
from lit_rlhf.types import Completions, Prompts, Rollout


@dataclass
class GreedyRollout(Rollout):
    """A rollout with the reward of each prompt's greedy completion.

    Attributes:
        greedy_rewards: The reward, 0 where no reward scored it, and so the prompt is left out; None until it is known.
    """

    greedy_rewards: Float[Tensor, " prompts"] | None = None


class ReMax(PolicyGradient):
    """ReMax: `A_i = R_i - r(x, greedy y)`, loss `-A_i log pi(y_i|x)`.

    Args:
        *args: See `OnlineAlgorithm`; `num_samples` may be 1, and one more completion of each prompt is decoded.
        **kwargs: See `OnlineAlgorithm`.
    """

    rollout_type = GreedyRollout
    extra_samples = 1

    def sample(self, prompts: Prompts) -> Completions:
        """Sample `num_samples` completions of each prompt, and its greedy one."""
        key = self.seed, self.current_epoch
        return self.sampler.sample(prompts, self.num_samples, self.sampling, *key, with_greedy=True)

    def collect(self, prompts: Prompts) -> Rollout:
        """Collect a rollout, and take the greedy completions out of it."""
        collected = super().collect(prompts)
        greedy, rollout = collected.samples(slice(self.num_samples, None)), collected.samples(slice(self.num_samples))
        assert isinstance(rollout, GreedyRollout)
        rollout = rollout.replace(valid=rollout.valid & greedy.valid)  # without a baseline nothing is learned
        return rollout.replace(greedy_rewards=greedy.total_rewards.squeeze(1))

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return of each completion minus the reward of the greedy one."""
        assert isinstance(rollout, GreedyRollout) and rollout.greedy_rewards is not None
        return self.returns_to_go(rollout, rollout.greedy_rewards.unsqueeze(1))
