"""Vanilla policy gradient: each token is an action, and a critic learns what return to expect before it.

Back to Basics, section 2.2: what PPO becomes at lambda = 1 once ratio, clips and whitening are taken away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rlhf import functional as F
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.models.loading import check_same_tokens
from lit_rlhf.models.scalar import Critic, value_head
from lit_rlhf.training.checks import check_positions
from lit_rlhf.training.monitor import Metrics
from lit_rlhf.types import Rollout


@dataclass
class ValuedRollout(Rollout):
    """A rollout with what a critic makes of it.

    Attributes:
        values: The return that the critic expects before each token, 0 where masked.
        targets: The return that it should have expected.
    """

    values: Float[Tensor, "prompts samples tokens"] | None = None
    targets: Float[Tensor, "prompts samples tokens"] | None = None


class VanillaPG(OnlineAlgorithm):
    """Policy gradient a token: `A_t = G_t - V(s_t)`, loss `-sum_t A_t log pi(y_t) + c sum_t (V(s_t) - G_t)^2 / 2`.

    `G_t` is the undiscounted return from token t on: minus `kl_coef` times k1 for each token, token-level rewards, and
    at the last token the reward of the whole completion.

    Args:
        *args: See `OnlineAlgorithm`.
        critic: What learns the baseline: a model of its own that starts from this folder or hub id, a reward model
            (with its head) or a policy; `policy`: from where the policy starts; `head`: no model, only a new output of
            the policy's own trunk, which then learns both. With `lora` a model of its own is trained by an adapter of
            the same options, too.
        critic_lr: The critic's learning rate; the policy's where None.
        value_coef: Weight of the critic's loss (c); with a model of its own it matters little.
        **kwargs: See `OnlineAlgorithm`.

    Raises:
        ValueError: If a number is out of its range, or there is nothing to copy the critic from; at `fit`, if the
            critic does not fit the policy.
    """

    rollout_type = ValuedRollout
    critic: Critic | nn.Linear

    def __init__(
        self,
        *args: Any,
        critic: str = "policy",
        critic_lr: float | None = None,
        value_coef: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not value_coef > 0:
            raise ValueError(f"value_coef={value_coef} must be above 0: the critic would learn nothing")
        if critic_lr is not None and not critic_lr > 0:
            raise ValueError(f"critic_lr={critic_lr} must be above 0, or null for the policy's")
        if critic == "policy" and not self.source:
            raise ValueError(
                "critic='policy' copies what the policy is loaded from, and this one came in memory: give "
                "the critic a folder or a hub id, or 'head'"
            )
        self.critic_source, self.critic_lr, self.value_coef = critic, critic_lr, value_coef

    def prepare(self, rollout: Rollout) -> ValuedRollout:
        """Add values and returns."""
        assert isinstance(rollout, ValuedRollout)
        values = torch.zeros_like(rollout.completions.logprobs)
        rollout = rollout.replace(values=values)
        for step in range(self.minibatches * self.sample_minibatches):
            part = self.slice(rollout, step)
            assert isinstance(part, ValuedRollout)
            self.prepare_slice(part, step)
        return rollout.replace(targets=self.returns(rollout, values))

    def prepare_slice(self, part: ValuedRollout, step: int) -> None:
        """Write values into a slice, which is a view of the rollout."""
        assert part.values is not None
        part.values.copy_(self.values(part))

    def returns(self, rollout: Rollout, values: Tensor) -> Float[Tensor, "prompts samples tokens"]:
        """What the critic should have expected before each token: what came."""
        return F.reward_to_go(self.token_rewards(rollout), rollout.completions.mask)

    def advantages(self, rollout: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """Return what came minus what was expected."""
        assert isinstance(rollout, ValuedRollout) and rollout.values is not None and rollout.targets is not None
        return rollout.targets - rollout.values

    def loss(self, rollout: Rollout) -> tuple[Tensor, Metrics]:
        """The policy's term of each completion and the critic's, both sums over tokens."""
        assert isinstance(rollout, ValuedRollout)
        logprobs, values = self.logprobs_and_values(rollout)
        policy_terms, metrics = self.policy_terms(rollout, logprobs)
        value_terms = self.value_terms(rollout, values)
        metrics["value_loss"] = value_terms.detach(), rollout.counted
        return policy_terms + self.value_coef * F.masked_sum(value_terms, rollout.completions.mask), metrics

    def policy_terms(self, rollout: ValuedRollout, logprobs: Tensor) -> tuple[Tensor, Metrics]:
        """The policy's term of each completion, and metrics."""
        assert rollout.advantages is not None
        return F.reinforce_loss(logprobs, rollout.advantages, rollout.completions.mask), {}

    def value_terms(self, rollout: ValuedRollout, values: Tensor) -> Tensor:
        """The critic's term of each token."""
        assert rollout.values is not None and rollout.targets is not None
        return F.value_loss(values, rollout.targets, rollout.values)

    def token_rewards(self, rollout: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """The reward of each token, the KL included."""
        completions = rollout.completions
        penalties = torch.zeros_like(completions.logprobs)
        if self.kl_place == "reward":
            estimate = {"k1": F.kl_k1, "k2": F.kl_k2, "k3": F.kl_k3}[self.kl_estimator]
            penalties = self.kl_coef * estimate(completions.logprobs, rollout.reference_logprobs)
        if rollout.token_rewards is not None:
            penalties = penalties - rollout.token_rewards
        return F.token_rewards_with_kl(rollout.rewards, penalties, completions.mask)

    # The critic

    def configure_model(self) -> None:
        """Load the critic beside the policy."""
        super().configure_model()
        if "critic" in self._modules:
            return
        if self.critic_source == "head":
            self.critic = new_head(self.policy.causal_lm)
            return
        source = self.source if self.critic_source == "policy" else self.critic_source
        options = {n: v for n, v in self.load_options.items() if n != "revision" or source == self.source}
        try:
            self.critic = Critic.from_pretrained(source, self.lora, **options)
        except OSError as error:
            raise ValueError(
                f"critic={self.critic_source!r} can't be loaded: give 'policy', 'head', a folder, or a model's id on "
                f"the hub ({error})"
            ) from error
        self.critic.check_vocabulary(self.policy.causal_lm)
        if source != self.source:
            check_same_tokens("critic", source, self.policy.tokenizer, **options)

    def place(self) -> None:
        """See `OnlineAlgorithm`; refuse a head on a policy that does not show its hidden states."""
        super().place()
        if isinstance(self.critic, Critic):
            check_positions(self, self.critic.config, "critic")
        if isinstance(self.critic, nn.Linear) and not self.policy.chunks_logits:
            raise ValueError(
                "critic='head' needs a policy whose hidden states are at hand, and this one scales or caps its logits: "
                "give the critic a model of its own, with critic='policy'"
            )

    def values(self, rollout: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """What the critic expects before each token."""
        prompts, completions = rollout.prompts, rollout.completions
        if isinstance(self.critic, Critic):
            return self.critic.values(prompts, completions)
        return value_head(self.critic, self.policy.features(prompts, completions), completions)

    def logprobs_and_values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Both with gradient; of a common trunk by one forward."""
        if isinstance(self.critic, Critic):
            return self.logprobs(rollout), self.values(rollout)
        features = self.policy.features(rollout.prompts, rollout.completions)
        return self.logprobs_from(rollout, features), value_head(self.critic, features, rollout.completions)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The policy's parameters and the critic's."""
        groups: list[dict[str, Any]] = [
            {"name": name, "params": [p for p in module.parameters() if p.requires_grad]}
            for name, module in (("policy", self.policy), ("critic", self.critic))
        ]
        if self.critic_lr is not None:
            groups[1]["lr"] = self.critic_lr
        return groups

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip policy and critic each by itself, so that the one's gradient does not shorten the other's."""
        if not gradient_clip_val or gradient_clip_val < 0:
            return
        by_value = gradient_clip_algorithm == "value"
        clip = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
        for group in optimizer.param_groups:
            clip(group["params"], gradient_clip_val)


def new_head(model: Any) -> nn.Linear:
    """Return an output for values, 0 at the start, on a causal language model's trunk."""
    weight: Tensor = model.get_output_embeddings().weight  # it reads the same features
    dtype = torch.promote_types(weight.dtype, torch.float32)  # its steps are too fine for bfloat16
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=dtype)
    nn.init.zeros_(head.weight)
    return head.to(weight.device)
