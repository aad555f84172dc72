"""Gradient variance and gradient noise scale: to compare methods and to choose a batch size."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf import functional as F
from lit_rlhf.algorithms import OnlineAlgorithm
from lit_rlhf.errors import InputError


class GradientNoise(Callback):
    """Measure the variance of the gradient over the prompts of a rollout; for any method that samples.

    The rollout is split into parts with equally many prompts. The gradient of each part is computed once more, before
    the first update of the rollout changes the weights; training is not affected. Logged:

    - `train/gradient_variance`: variance of an update's gradient (before clipping) over the choice of prompts and
      samples, summed over the policy's weights;
    - `train/gradient_noise_scale`: in prompts over all ranks, the variance of a single prompt's gradient divided by the
      squared norm of the mean gradient, both averaged over measurements. An update on far fewer prompts is mostly
      noise; on far more, mostly wasted compute. McCandlish et al., 2018, arXiv 1812.06162, equation 2.9 and appendix A.

    A measurement takes another forward and backward pass over the rollout and holds two more copies of the gradients.
    If the critic is a head on the policy's trunk, its gradient is included.

    Args:
        every_n_rollouts: Rollouts between two measurements; updates, if an update takes several rollouts.
        parts: Parts of a rollout on one device, at least 2; `num_minibatches` if that is larger. More parts give a more
            precise variance.
        smoothing: Decay of the moving averages of the noise scale, in [0, 1).

    Raises:
        ValueError: If a number is out of range; at `fit` if the method does not sample, or if a rollout has fewer
            prompts than parts.
    """

    def __init__(self, every_n_rollouts: int = 10, parts: int = 4, smoothing: float = 0.9) -> None:
        if every_n_rollouts < 1:
            raise InputError(f"every_n_rollouts={every_n_rollouts} must be at least 1")
        if parts < 2:
            raise InputError(f"parts={parts} must be at least 2: one part has no variance")
        if not 0 <= smoothing < 1:
            raise InputError(f"smoothing={smoothing} must be at least 0 and below 1")
        self.every_n_rollouts, self.parts, self.smoothing = every_n_rollouts, parts, smoothing
        self.averages: list[float] = []

    @property
    def noise_scale(self) -> float | None:
        """Noise scale in prompts; infinite if the squared norm is estimated as 0 or less, None before a measurement."""
        if not self.averages:
            return None
        variance, square = self.averages
        return variance / square if square > 0 else math.inf

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the averages of an earlier fit; a resumed run loads its own."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.averages = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the method samples and that its rollouts can be split."""
        if not isinstance(pl_module, OnlineAlgorithm):
            raise InputError(
                f"{type(self).__name__} needs a method that samples, and {type(pl_module).__name__} does not: remove it"
            )
        prompts = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        if prompts is not None:
            self._check_parts(pl_module, prompts // pl_module.dynamic_sampling.rounds)
        super().on_train_start(trainer, pl_module)

    def _check_parts(self, algorithm: OnlineAlgorithm, prompts: int) -> int:
        """Return the number of parts of a rollout; raise a ValueError if it has fewer prompts."""
        parts = max(self.parts, algorithm.updates.num_minibatches)
        if parts > prompts:
            raise InputError(f"a rollout of {prompts} prompts can't be split into {parts} parts: raise data.batch_size")
        return parts

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure a rollout before its first update."""
        algorithm: Any = pl_module
        window = max(algorithm.steps_per_rollout, trainer.accumulate_grad_batches)
        step = trainer.fit_loop.epoch_loop.batch_idx % window
        window_idx = trainer.fit_loop.total_batch_idx // window
        first = step < trainer.accumulate_grad_batches
        if first and window_idx % self.every_n_rollouts == 0 and algorithm.rollout is not None:
            with algorithm.gathered():
                self._measure(trainer, algorithm)

    def _measure(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> None:
        """Measure the gradient of the current rollout and log the variance and the noise scale."""
        assert algorithm.rollout is not None
        rollout = algorithm.rollout
        num_parts = self._check_parts(algorithm, len(rollout.prompts))
        size = len(rollout.prompts) // num_parts
        parameters = [p for p in algorithm.policy.parameters() if p.requires_grad]
        total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        measured, squares = torch.zeros(2, dtype=torch.float64, device=F.float64_device(algorithm.device))
        for i in range(num_parts):
            with torch.enable_grad(), trainer.precision_plugin.train_step_context():
                _, terms, mask, _ = algorithm.loss_terms(rollout.rows(slice(i * size, (i + 1) * size)).trim())
            if not mask.any():  # no gradient, as opposed to a gradient of zero
                continue
            measured += 1
            loss = terms.masked_fill(~mask, 0.0).sum() / mask.sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for summed, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    summed += gradient
                    squares += (F.to_float64(gradient) ** 2).sum()
        parts = int(algorithm.sum_over_ranks(measured))
        if parts < 2:
            return
        mean_square = self._mean_square(algorithm, total, parts)
        squares = algorithm.sum_over_ranks(squares)
        estimates = F.gradient_noise(float(squares), float(mean_square), parts, size)
        if not all(map(math.isfinite, estimates)):  # the update is skipped
            return
        weight = self.smoothing if self.averages else 0.0
        self.averages = [
            weight * a + (1 - weight) * e for a, e in zip(self.averages or estimates, estimates, strict=True)
        ]
        prompts = self._rollouts_per_update(trainer, algorithm) * len(rollout.prompts) * trainer.world_size
        algorithm.log("train/gradient_variance", estimates[0] / prompts, batch_size=1)
        algorithm.log("train/gradient_noise_scale", float(self.noise_scale or 0.0), batch_size=1)

    def _mean_square(self, algorithm: OnlineAlgorithm, total: list[Tensor], parts: int) -> Tensor:
        """Return the squared norm of the mean gradient over the parts of all ranks."""
        return torch.stack([((F.to_float64(algorithm.sum_over_ranks(g)) / parts) ** 2).sum() for g in total]).sum()

    def _rollouts_per_update(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> float:
        """Return the number of rollouts per update: below 1 if a rollout is split into several updates."""
        return trainer.accumulate_grad_batches / algorithm.updates.minibatches_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the moving averages."""
        return {**super().state_dict(), "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the moving averages."""
        super().load_state_dict(state_dict)
        self.averages = state_dict["averages"]
