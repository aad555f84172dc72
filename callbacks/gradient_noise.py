"""How noisy the gradient of an update is, measured: by method, and as a guide to the batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf import functional as F
from lit_rlhf.algorithms import OnlineAlgorithm


class GradientNoise(Callback):
    """Measures the variance of the gradient between the prompts of a rollout; for any method that samples.

    The rollout is cut into parts of equally many prompts, and the gradient of each is computed once more, before the
    first update of the rollout changes the weights; training is left as it is. Logged:

    - `train/gradient_variance`: the sum over the policy's weights of the variance of an update's gradient (before
      clipping), as it would be among other prompts and samples;
    - `train/gradient_noise_scale`: in prompts of all ranks, the variance of a single prompt's gradient over the squared
      norm of the mean gradient, both averaged over measurements. An update on far fewer prompts is mostly noise; on far
      more, mostly waste. McCandlish et al., 2018, arXiv 1812.06162, equation 2.9 and appendix A.

    A measurement takes another forward and backward of the rollout, and holds two more copies of the gradients. Of a
    critic that is a head on the policy's trunk, the gradient counts too.

    Args:
        every_n_rollouts: How often to measure; where an update takes several rollouts, every so many updates.
        parts: Parts of a rollout on one device, 2 or more; `minibatches` where that is more. The more there are, the
            surer is the variance.
        smoothing: Weight of the past in the averages of the noise scale, from 0 to below 1.

    Raises:
        ValueError: If a number is out of its range, or at `fit` if the method does not sample, or a rollout has fewer
            prompts than parts.
    """

    def __init__(self, every_n_rollouts: int = 10, parts: int = 4, smoothing: float = 0.9) -> None:
        if every_n_rollouts < 1:
            raise ValueError(f"every_n_rollouts={every_n_rollouts} must be at least 1")
        if parts < 2:
            raise ValueError(f"parts={parts} must be at least 2: there is no variance within one")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing} must be at least 0 and below 1")
        self.every_n_rollouts, self.parts, self.smoothing = every_n_rollouts, parts, smoothing
        self.averages: list[float] = []

    @property
    def noise_scale(self) -> float | None:
        """The noise scale in prompts; infinite where nothing of the gradient is sure, None before a measurement."""
        if not self.averages:
            return None
        variance, square = self.averages
        return variance / square if square > 0 else math.inf

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; a resumed run loads its own averages."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.averages = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to measure."""
        if not isinstance(pl_module, OnlineAlgorithm):
            raise ValueError(
                f"{type(self).__name__} is for methods that sample, and {type(pl_module).__name__} does not"
            )
        prompts = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        if prompts is not None:
            self._check_parts(pl_module, prompts)
        super().on_train_start(trainer, pl_module)

    def _check_parts(self, module: OnlineAlgorithm, prompts: int) -> int:
        """Return how many parts a rollout is cut into; raise a ValueError if it has too few prompts for that."""
        cuts = max(self.parts, module.minibatches)
        if cuts > prompts:
            raise ValueError(f"a rollout of {prompts} prompts can't be cut into {cuts} parts: raise data.batch_size")
        return cuts

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure a rollout before its first update."""
        module: Any = pl_module
        window = max(module.repeats, trainer.accumulate_grad_batches)
        step = trainer.fit_loop.epoch_loop.batch_idx % window
        number = trainer.fit_loop.total_batch_idx // window
        first = step < trainer.accumulate_grad_batches
        if first and number % self.every_n_rollouts == 0 and module.rollout is not None:
            self.measure(trainer, module)

    def measure(self, trainer: Trainer, module: OnlineAlgorithm) -> None:
        """Measure the gradient of the current rollout, and log it."""
        assert module.rollout is not None
        rollout = module.rollout
        cuts = self._check_parts(module, len(rollout.prompts))
        size = len(rollout.prompts) // cuts
        parameters = [p for p in module.policy.parameters() if p.requires_grad]
        total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        counted, squares = torch.zeros(2, dtype=torch.float64, device=module.device)
        for i in range(cuts):
            with torch.enable_grad(), trainer.precision_plugin.train_step_context():
                terms, mask, _ = module.terms(rollout.rows(slice(i * size, (i + 1) * size)).trim())
            if not mask.any():  # no gradient, which is another thing than one of zero
                continue
            counted += 1
            loss = terms.masked_fill(~mask, 0.0).sum() / mask.sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for whole, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    whole += gradient
                    squares += (gradient.double() ** 2).sum()
        parts = int(module.sum_over_ranks(counted))
        if parts < 2:
            return
        mean_square = self._mean_square(module, total, parts)
        squares = module.sum_over_ranks(squares)
        estimates = F.gradient_noise(float(squares), float(mean_square), parts, size)
        weight = self.smoothing if self.averages else 0.0
        self.averages = [
            weight * a + (1 - weight) * e for a, e in zip(self.averages or estimates, estimates, strict=True)
        ]
        prompts = rollouts_of_update(trainer, module) * len(rollout.prompts) * trainer.world_size
        module.log("train/gradient_variance", estimates[0] / prompts, batch_size=1)
        module.log("train/gradient_noise_scale", float(self.noise_scale or 0.0), batch_size=1)

    def _mean_square(self, module: OnlineAlgorithm, total: list[Tensor], parts: int) -> Tensor:
        """The squared norm of the mean gradient of all parts, on all ranks."""
        return torch.stack([((module.sum_over_ranks(g).double() / parts) ** 2).sum() for g in total]).sum()

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {**super().state_dict(), "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them."""
        super().load_state_dict(state_dict)
        self.averages = state_dict["averages"]


def rollouts_of_update(trainer: Trainer, module: OnlineAlgorithm) -> float:
    """How many rollouts an update learns from: below 1 where a rollout is cut into several updates."""
    return trainer.accumulate_grad_batches / (module.minibatches * module.sample_minibatches)
