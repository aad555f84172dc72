"""Growing batch: more prompts per rollout during training, by a schedule or by the gradient noise scale."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.algorithms import OnlineAlgorithm
from lit_rlhf.callbacks.gradient_noise import GradientNoise
from lit_rlhf.data.sampler import BlockSampler, ResumableLoader
from lit_rlhf.errors import InputError


class GrowingBatch(Callback):
    """Base of the growing batches: start at `data.batch_size`; an epoch still yields each row at most once.

    `train/prompts` is the number of prompts of a rollout over all devices. The learning rate is not changed. With
    `max_epochs`, growth shortens the run; a warm-up given as a fraction counts the updates without growth.

    Args:
        maximum: Largest number of prompts per rollout and device, times `dynamic_sampling.rounds`.

    Raises:
        ValueError: At `fit` if the data module is not a `lit_rlhf.PromptData`, loads in worker processes (which would
            prefetch batches of the old size), or has too few rows, or if `maximum` can't be cut into the rounds.
    """

    def __init__(self, maximum: int) -> None:
        if maximum < 1:
            raise InputError(f"maximum={maximum} must be at least 1")
        self.maximum = maximum
        self.start, self.rounds = 0, 1
        self.sizes: list[tuple[int, int]] = []

    @abstractmethod
    def plan(self, trainer: Trainer, steps_done: int) -> list[tuple[int, int]]:
        """Return the block sizes of this epoch, as known after `steps_done` steps, as pairs `(first block, size)`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the sizes of an earlier fit; a resumed run loads its own."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.sizes = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the batches can grow, and plan the current epoch (also after a resume)."""
        loader: Any = trainer.train_dataloader
        if not isinstance(loader, ResumableLoader) or loader.num_workers > 0:
            raise InputError(
                f"{type(self).__name__} needs a lit_rlhf.PromptData with num_workers=0, whose block size can change "
                "during an epoch"
            )
        if reload := getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
            raise InputError(
                f"{type(self).__name__} changes the block size of a single dataloader: remove "
                f"reload_dataloaders_every_n_epochs={reload}"
            )
        self.start, needed = loader.blocks.sizes[0][1], loader.blocks.rows_for(self.maximum)
        if self.maximum < self.start:
            raise InputError(
                f"maximum={self.maximum} is below data.batch_size={self.start}: raise it, batches only grow"
            )
        if needed > loader.blocks.size:
            raise InputError(
                f"maximum={self.maximum} needs {needed} rows per epoch over all devices, and the data have "
                f"{loader.blocks.size}: lower it, or add rows"
            )

        self.rounds = getattr(getattr(pl_module, "dynamic_sampling", None), "rounds", 1)
        if self.maximum % self.rounds:
            raise InputError(
                f"maximum={self.maximum} is sampled in dynamic_sampling.rounds={self.rounds} parts: give a multiple"
            )

        # Call it now as well, so that the Trainer can tell whether a checkpoint was saved at the end of an epoch.
        loader.on_begin = lambda step: set_block_sizes(trainer, self.plan(trainer, step))
        loader.on_begin(trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def state_dict(self) -> dict[str, Any]:
        """Return the block sizes of this epoch."""
        return {"sizes": list(self.sizes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the block sizes."""
        self.sizes = [tuple(entry) for entry in state_dict["sizes"]]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the number of prompts of a new rollout."""
        if batch_idx % getattr(pl_module, "steps_per_rollout", 1) == 0:
            pl_module.log("train/prompts", len(batch) * trainer.world_size / self.rounds, batch_size=1)


class BatchSchedule(GrowingBatch):
    """Grow rollouts linearly, from `data.batch_size` prompts to `maximum` (times `dynamic_sampling.rounds` both).

    Args:
        maximum: Largest number of prompts per rollout and device, times `dynamic_sampling.rounds`.
        updates: Number of updates after which the maximum is reached.

    Raises:
        ValueError: If a number is below 1, or at `fit`; see `GrowingBatch`.
    """

    def __init__(self, maximum: int, updates: int) -> None:
        super().__init__(maximum)
        if updates < 1:
            raise InputError(f"updates={updates} must be at least 1")
        self.updates = updates

    def size_at(self, update: int) -> int:
        """Return the number of prompts that are sampled, at most, for a rollout after `update` updates."""
        size = self.start + int((self.maximum - self.start) * min(1.0, update / self.updates))
        return size - size % self.rounds

    def plan(self, trainer: Trainer, steps_done: int) -> list[tuple[int, int]]:
        """Plan all blocks of an epoch from the number of updates at its start; within an epoch, the remaining ones."""
        if steps_done and self.sizes:
            return list(self.sizes)
        sampler, accumulate = blocks_of(trainer), trainer.accumulate_grad_batches
        before = trainer.global_step - steps_done // accumulate
        blocks_done = -(-steps_done // sampler.repeats)
        self.sizes = [(0, self.start)] if blocks_done else []
        for block in range(blocks_done, sampler.size):
            size = self.size_at(before + block * sampler.repeats // accumulate)
            if not self.sizes or size != self.sizes[-1][1]:
                self.sizes.append((block, size))
            if size == self.maximum:
                break
        return list(self.sizes)


class AdaptiveBatch(GradientNoise, GrowingBatch):
    """Grow rollouts with the gradient noise scale; they never shrink.

    Early in training, the gradients of few prompts agree, and many small updates learn most per sampled completion.
    Later, the mean gradient shrinks while its noise stays, so an update needs more prompts. The noise scale measures
    how many (see `GradientNoise`). The prompts per update follow it and at most double from one measurement to the
    next. The KL per update is no substitute: it measures the length of a step, not whether more prompts would have
    changed its direction.

    Args:
        maximum: Largest number of prompts per rollout and device, times `dynamic_sampling.rounds`.
        every_n_rollouts: See `GradientNoise`.
        parts: See `GradientNoise`.
        smoothing: See `GradientNoise`.

    Raises:
        ValueError: See `GradientNoise` and `GrowingBatch`.
    """

    def __init__(self, maximum: int, every_n_rollouts: int = 5, parts: int = 4, smoothing: float = 0.9) -> None:
        GradientNoise.__init__(self, every_n_rollouts, parts, smoothing)
        GrowingBatch.__init__(self, maximum)

    def plan(self, trainer: Trainer, steps_done: int) -> list[tuple[int, int]]:
        """Start an epoch with the last size of the previous one; within an epoch, keep its sizes."""
        if steps_done == 0 or not self.sizes:
            self.sizes = [(0, self.sizes[-1][1] if self.sizes else self.start)]
        return list(self.sizes)

    def _measure(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> None:
        """Measure, and grow the next rollout to the noise scale."""
        super()._measure(trainer, algorithm)
        current = self.sizes[-1][1]
        target = (self.noise_scale or 0.0) / (trainer.world_size * self._rollouts_per_update(trainer, algorithm))
        target *= algorithm.dynamic_sampling.rounds  # of which a rollout keeps one
        size = max(current, int(min(target, 2 * current, self.maximum)) // self.rounds * self.rounds)
        if size > current:
            next_block = trainer.fit_loop.epoch_loop.batch_idx // algorithm.steps_per_rollout + 1
            self.sizes.append((next_block, size))
            set_block_sizes(trainer, list(self.sizes))


def blocks_of(trainer: Trainer) -> BlockSampler:
    """Return the sampler of the training data."""
    loader = trainer.train_dataloader
    assert isinstance(loader, ResumableLoader)
    return loader.blocks


def set_block_sizes(trainer: Trainer, sizes: list[tuple[int, int]]) -> None:
    """Set the block sizes of this epoch and update the Trainer's count of its batches."""
    blocks_of(trainer).sizes = sizes
    loop = trainer.fit_loop
    combined: Any = loop._combined_loader
    fetcher: Any = loop._data_fetcher
    loop.max_batches = fetcher.length = length = len(combined)
    if isinstance(trainer.val_check_interval, float):
        trainer.val_check_batch = max(1, int(length * trainer.val_check_interval))
