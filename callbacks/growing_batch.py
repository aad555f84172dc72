"""Rollouts of more prompts as training goes on: by a schedule, or as the gradient's noise asks for."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.callbacks.gradient_noise import GradientNoise, rollouts_of_update
from lit_rlhf.data.sampler import BlockSampler, ResumableLoader


class GrowingBatch(Callback):
    """What both kinds of growth share: they start at `data.batch_size`, and an epoch still hands over each row once.

    `train/prompts` is how many prompts a rollout has, on all devices together. The learning rate stays as it is. With
    `max_epochs`, growth shortens the run; a warm-up given as a share counts the updates without growth.

    Args:
        maximum: Prompts of a rollout and device to grow to.

    Raises:
        ValueError: At `fit`, if the data are no `lit_rlhf.PromptData` or load in worker processes (which would be ahead
            of the growth), or hold too few rows.
    """

    def __init__(self, maximum: int) -> None:
        if maximum < 1:
            raise ValueError(f"maximum={maximum} must be at least 1")
        self.maximum = maximum
        self.start = 0
        self.sizes: list[tuple[int, int]] = []

    @abstractmethod
    def plan(self, trainer: Trainer, steps_done: int) -> list[tuple[int, int]]:
        """Return the sizes of this epoch's blocks, as far as they are known after so many of its steps."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; a resumed run loads its own sizes."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.sizes = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the data can grow, and plan the epoch that is resumed."""
        loader: Any = trainer.train_dataloader
        if not isinstance(loader, ResumableLoader) or loader.num_workers > 0:
            raise ValueError(
                f"{type(self).__name__} needs its data from a lit_rlhf.PromptData with num_workers=0, which hands over "
                "blocks as they grow"
            )
        if reload := getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
            raise ValueError(
                f"{type(self).__name__} grows the blocks of one loader: leave out "
                f"reload_dataloaders_every_n_epochs={reload}"
            )
        self.start, needed = loader.blocks.sizes[0][1], loader.blocks.rows_for(self.maximum)
        if self.maximum < self.start:
            raise ValueError(f"maximum={self.maximum} is below data.batch_size={self.start}: a batch only grows")
        if needed > loader.blocks.size:
            raise ValueError(
                f"maximum={self.maximum} needs {needed} rows an epoch on all devices, and there are "
                f"{loader.blocks.size}: lower it, or give more rows"
            )

        # now, for the Trainer to see whether an epoch was over when it was saved; and when an epoch really begins
        loader.on_begin = lambda step: grow(trainer, self.plan(trainer, step))
        loader.on_begin(trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def state_dict(self) -> dict[str, Any]:
        """Return the sizes of this epoch's blocks."""
        return {"sizes": self.sizes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them."""
        self.sizes = [tuple(entry) for entry in state_dict["sizes"]]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log how many prompts a new rollout has."""
        if batch_idx % getattr(pl_module, "repeats", 1) == 0:
            pl_module.log("train/prompts", float(len(batch) * trainer.world_size), batch_size=1)


class BatchSchedule(GrowingBatch):
    """Lets a rollout grow in a straight line from `data.batch_size` prompts.

    Args:
        maximum: Prompts of a rollout and device to grow to.
        updates: After how many updates it gets there.

    Raises:
        ValueError: If a number is below 1, or at `fit`; see `GrowingBatch`.
    """

    def __init__(self, maximum: int, updates: int) -> None:
        super().__init__(maximum)
        if updates < 1:
            raise ValueError(f"updates={updates} must be at least 1")
        self.updates = updates

    def size_at(self, update: int) -> int:
        """Prompts of a rollout that begins after so many updates."""
        return self.start + int((self.maximum - self.start) * min(1.0, update / self.updates))

    def plan(self, trainer: Trainer, steps_done: int) -> list[tuple[int, int]]:
        """Plan the whole epoch, from the number of updates at its start; of one that has begun, what is left."""
        if steps_done and self.sizes:
            return list(self.sizes)
        sampler, accumulate = blocks_of(trainer), trainer.accumulate_grad_batches
        before = trainer.global_step - steps_done // accumulate
        handed_over = -(-steps_done // sampler.repeats)
        self.sizes = [(0, self.start)] if handed_over else []
        for block in range(handed_over, sampler.size):
            size = self.size_at(before + block * sampler.repeats // accumulate)
            if not self.sizes or size != self.sizes[-1][1]:
                self.sizes.append((block, size))
            if size == self.maximum:
                break
        return list(self.sizes)


class AdaptiveBatch(GradientNoise, GrowingBatch):
    """Lets a rollout grow with the gradient's noise scale, and never shrink.

    While the policy still learns fast, the gradients of few prompts agree, and many small updates go furthest for the
    completions sampled. As it becomes stable the mean gradient fades, the noise stays, and it takes more prompts to see
    a direction: that number is the noise scale (see `GradientNoise`), which the prompts of an update follow, at most
    doubling from one measurement to the next. The KL of an update was the other candidate; it says how far a step
    went, but not whether more prompts would have changed where.

    Args:
        maximum: Prompts of a rollout and device to grow to.
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
        """Begin an epoch with the size that the last one ended with, or go on inside one."""
        if steps_done == 0 or not self.sizes:
            self.sizes = [(0, self.sizes[-1][1] if self.sizes else self.start)]
        return list(self.sizes)

    def measure(self, trainer: Trainer, module: Any) -> None:
        """Measure, and let the next rollout have as many prompts as the noise asks for."""
        super().measure(trainer, module)
        now = self.sizes[-1][1]
        wanted = (self.noise_scale or 0.0) / (trainer.world_size * rollouts_of_update(trainer, module))
        size = max(now, int(min(wanted, 2 * now, self.maximum)))
        if size > now:
            following = trainer.fit_loop.epoch_loop.batch_idx // module.repeats + 1
            self.sizes.append((following, size))
            grow(trainer, list(self.sizes))


def blocks_of(trainer: Trainer) -> BlockSampler:
    """The sampler of the training data."""
    loader = trainer.train_dataloader
    assert isinstance(loader, ResumableLoader)
    return loader.blocks


def grow(trainer: Trainer, sizes: list[tuple[int, int]]) -> None:
    """Give the blocks of this epoch other sizes, and tell the Trainer how long it is now."""
    blocks_of(trainer).sizes = sizes
    loop = trainer.fit_loop
    combined: Any = loop._combined_loader
    fetcher: Any = loop._data_fetcher
    loop.max_batches = fetcher.length = length = len(combined)
    if isinstance(trainer.val_check_interval, float):
        trainer.val_check_batch = max(1, int(length * trainer.val_check_interval))
