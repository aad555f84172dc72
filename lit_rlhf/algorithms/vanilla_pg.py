"""Vanilla policy gradient: each token is an action, and a critic learns the expected return before it.

Back to Basics (Ahmadian et al., 2024, arXiv 2402.14740), section 2.2: PPO at lambda = 1 without ratio, clipping
and whitening.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rlhf import functional as F
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.errors import InputError
from lit_rlhf.models.loading import check_same_tokens
from lit_rlhf.models.offload import in_main_memory
from lit_rlhf.models.pretrained import shared_options
from lit_rlhf.models.scalar import Critic, value_head
from lit_rlhf.types import Metrics, Prompts, Rollout


@dataclass
class ValuedRollout(Rollout):
    """A rollout with the values of a critic.

    Attributes:
        old_values: The critic's value before each token when the rollout was collected, 0 where masked.
        value_targets: The values to learn.
        values: The current critic's values, with gradient; set by `evaluate`.
    """

    old_values: Float[Tensor, "prompts samples tokens"] | None = None
    value_targets: Float[Tensor, "prompts samples tokens"] | None = None
    values: Float[Tensor, "prompts samples tokens"] | None = None


class VanillaPG(OnlineAlgorithm):
    """Policy gradient per token: `A_t = G_t - V(s_t)`, loss `-sum_t A_t log pi(y_t) + c sum_t (V(s_t) - G_t)^2 / 2`.

    `G_t` is the undiscounted return from token t: minus `kl_coef` times k1 of each token, token-level rewards, and the
    reward of the whole completion at the last token.

    Args:
        *args: See `OnlineAlgorithm`.
        critic: `policy`: a second model that starts from the same weights as the policy; a folder or hub id: a second
            model that starts from a reward model (with its head) or a policy; `head`: a value head on the policy's own
            trunk. With `lora`, a second model also gets an adapter with these options.
        critic_lr: The critic's learning rate; the policy's if null.
        offload_critic: Whether a second model and its optimizer's state are in main memory while completions are
            sampled and scored.
        vf_coef: Coefficient of the value loss (c); of little effect for a second model.
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
        offload_critic: bool = False,
        vf_coef: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not vf_coef > 0:
            raise InputError(f"vf_coef={vf_coef} must be above 0: the critic would learn nothing")
        if critic_lr is not None and not critic_lr > 0:
            raise InputError(f"critic_lr={critic_lr} must be above 0, or null for the policy's")
        if critic == "policy" and not self.pretrained:
            raise InputError(
                "critic='policy' copies the model that the policy is loaded from, and this policy is in memory: give "
                "the critic a folder or a hub id, or 'head'"
            )
        if critic == "head" and offload_critic:
            raise InputError("offload_critic=True needs a second model, and critic='head' is a head on the policy")
        self.critic_pretrained, self.critic_lr, self.vf_coef = critic, critic_lr, vf_coef
        self.offload_critic = offload_critic

    def setup(self, stage: str) -> None:
        """Check the configuration, and forget an evaluation that failed."""
        self._evaluation_context = contextlib.ExitStack()
        super().setup(stage)

    def collect(self, prompts: Prompts) -> Rollout:
        """Collect a rollout."""
        with self.without_critic():
            return super().collect(prompts)

    def on_validation_epoch_start(self) -> None:
        """Start an evaluation."""
        super().on_validation_epoch_start()
        self._evaluation_context.enter_context(self.without_critic())

    def _log_evaluation(self, prefix: str) -> None:
        self._evaluation_context.close()
        super()._log_evaluation(prefix)

    def on_predict_start(self) -> None:
        """Set up the models."""
        super().on_predict_start()
        self._evaluation_context.enter_context(self.without_critic())

    def on_predict_epoch_end(self) -> None:
        """End the prediction."""
        self._evaluation_context.close()
        super().on_predict_epoch_end()

    def without_critic(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the critic is in main memory, if that is chosen."""
        if not self.offload_critic:
            return contextlib.nullcontext()
        optimizers = self.trainer.optimizers
        return in_main_memory(self.critic, optimizers[0] if optimizers else None)

    def prepare(self, rollout: Rollout) -> Rollout:
        """Add values and value targets."""
        assert isinstance(rollout, ValuedRollout)
        old_values = torch.zeros_like(rollout.completions.logprobs)
        rollout = rollout.replace(old_values=old_values)
        for step in range(self.updates.minibatches_per_epoch):
            part = self.minibatch(rollout, step)
            assert isinstance(part, ValuedRollout) and part.old_values is not None
            part.old_values.copy_(self.values(part))  # a view of the rollout's
        return super().prepare(rollout.replace(value_targets=self.value_targets(rollout)))

    def value_targets(self, rollout: ValuedRollout) -> Float[Tensor, "prompts samples tokens"]:
        """Value targets: Monte-Carlo returns (reward-to-go)."""
        return F.reward_to_go(self.token_rewards(rollout), rollout.completions.mask)

    def token_rewards(self, rollout: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """Reward of each token, including its KL penalty."""
        return F.token_rewards_with_kl(rollout.rewards, self.token_penalties(rollout), rollout.completions.mask)

    def advantages(self, rollout: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """Value targets minus values."""
        assert isinstance(rollout, ValuedRollout)
        assert rollout.old_values is not None and rollout.value_targets is not None
        return rollout.value_targets - rollout.old_values

    def evaluate(self, part: Rollout) -> Rollout:
        """Add log-probabilities and values; with a value head, both from one forward pass."""
        assert isinstance(part, ValuedRollout)
        if isinstance(self.critic, Critic):
            return part.replace(logprobs=self.logprobs(part), values=self.values(part))
        features = self.policy.features(part.prompts, part.completions)
        logprobs = self.policy.logprobs_from(features, part.completions, self.sampling.temperature)
        return part.replace(logprobs=logprobs, values=value_head(self.critic, features, part.completions))

    def loss(self, part: Rollout) -> tuple[Tensor, Metrics]:
        """Policy loss and value loss of each completion, both sums over tokens."""
        assert isinstance(part, ValuedRollout)
        policy_terms, metrics = self.policy_loss(part)
        value_terms = self.value_loss(part)
        metrics["value_loss"] = value_terms.detach(), part.loss_mask
        return policy_terms + self.vf_coef * F.masked_sum(value_terms, part.completions.mask), metrics

    def policy_loss(self, part: ValuedRollout) -> tuple[Float[Tensor, "prompts samples"], Metrics]:
        """Policy loss of each completion, and metrics."""
        assert part.logprobs is not None and part.advantages is not None
        return F.reinforce_loss(part.logprobs, part.advantages, part.completions.mask), {}

    def value_loss(self, part: ValuedRollout) -> Float[Tensor, "prompts samples tokens"]:
        """Value loss of each token."""
        assert part.values is not None and part.value_targets is not None and part.old_values is not None
        return F.value_loss(part.values, part.value_targets, part.old_values)

    # The critic

    def configure_model(self) -> None:
        """Load the policy and the critic."""
        super().configure_model()
        if "critic" in self._modules:
            return
        if self.critic_pretrained == "head":
            self.critic = new_value_head(self.policy.causal_lm)
            return
        pretrained = self.pretrained if self.critic_pretrained == "policy" else self.critic_pretrained
        options = self.load_options if pretrained == self.pretrained else shared_options(self.load_options)
        try:
            self.critic = Critic.from_pretrained(pretrained, self.lora, **options)
        except OSError as error:
            raise InputError(
                f"critic={self.critic_pretrained!r} can't be loaded: give 'policy', 'head', a folder, or a model's id "
                f"on the hub ({error})"
            ) from error
        self.checkpoint_layers(self.critic)
        self.critic.check_vocabulary(self.policy.causal_lm)
        if pretrained != self.pretrained:
            check_same_tokens("critic", pretrained, self.policy.tokenizer, **options)

    def setup_models(self) -> None:
        """Check that the critic fits the data and the policy."""
        super().setup_models()
        if isinstance(self.critic, Critic):
            self._check_positions(self.critic.config, "critic")
        if isinstance(self.critic, nn.Linear) and not self.policy.chunks_logits:
            raise InputError(
                "critic='head' needs the hidden states of the policy, and this one scales or caps its logits: use "
                "a separate model, with critic='policy'"
            )

    def values(self, part: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """Return the critic's value before each token, with gradient."""
        prompts, completions = part.prompts, part.completions
        if isinstance(self.critic, Critic):
            return self.critic.values(prompts, completions)
        return value_head(self.critic, self.policy.features(prompts, completions), completions)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters of the policy and of the critic."""
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
        """Clip policy and critic separately, so that one gradient does not shrink the other."""
        if not gradient_clip_val or gradient_clip_val < 0:
            return
        by_value = str(gradient_clip_algorithm) == "value"
        clip = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
        for group in optimizer.param_groups:
            clip(group["params"], gradient_clip_val)


def new_value_head(model: Any) -> nn.Linear:
    """Return a linear value head, zero at the start, on a causal language model's hidden states."""
    weight: Tensor = model.get_output_embeddings().weight  # reads the same features
    dtype = torch.promote_types(weight.dtype, torch.float32)  # bfloat16 is too coarse for its updates
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=dtype)
    nn.init.zeros_(head.weight)
    return head.to(weight.device)
