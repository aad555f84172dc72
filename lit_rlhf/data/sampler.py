"""Samplers and the resumable loader: which rows each training step gets, also after a resume.

A rollout is used for R training steps, so its prompts must be yielded R times in a row. With automatic optimization
the Trainer counts steps and derives progress, `max_steps`, accumulation and validation from the loader's length. These
are only right if the sampler does the repetition. Hence:

- The sampler is a `DistributedSampler`; the Trainer replaces any other kind when there are several processes.
- It yields whole blocks (lists of indices) and the loader has `batch_size=None`; a batch sampler would be replaced too.
- Its order depends only on the seed and the epoch, its position only on the Trainer's batch count, which checkpoints
  contain. So it has no state to save.
- The loader's iterator is a generator that looks up its position at the first `next()`. `iter()` is too early: at the
  start of a run the Trainer calls it before `set_epoch`, and workers would prefetch batches of the wrong epoch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import lightning
import numpy as np
from torch.utils.data import DataLoader, DistributedSampler


class BlockSampler(DistributedSampler[list[int]]):
    """Yields each block of shuffled row indices `repeats` times in a row.

    Over all ranks, a block is `num_replicas * batch_size` consecutive rows of a permutation; rank r takes its r-th
    part. So two ranks see the same rows as one process with twice the batch size. An incomplete last block or window
    is dropped; its rows get another chance in the next epoch's permutation.

    Args:
        dataset: The data set; only its length is used.
        batch_size: Rows per block and rank, unless `sizes` is changed.
        num_replicas: Number of ranks.
        rank: This rank.
        repeats: Consecutive steps that get the same block.
        accumulate: Steps per update. An epoch is cut to whole windows of `max(accumulate, repeats)` steps, because the
            Trainer steps the optimizer early in an incomplete last window.

    Attributes:
        sizes: Block sizes as pairs `(first block, rows per block and rank)`; the first pair is for block 0. Entries for
            blocks that have been yielded must not change; the length depends on the others.
        seed: Seed of the permutation, together with the epoch.
        start: Step of the epoch to start at. The length still counts all steps of the epoch.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        repeats: int = 1,
        accumulate: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank)  # type: ignore[arg-type]
        self.size = len(dataset)
        self.sizes = [(0, batch_size)]
        self.repeats = repeats
        self.window = max(accumulate, repeats)
        self.start = 0

    @property
    def min_rows(self) -> int:
        """Rows of an epoch of one window (see `accumulate`) over all ranks, at the largest block size."""
        return self.rows_for(max(size for _, size in self.sizes))

    def rows_for(self, batch_size: int) -> int:
        """Return the rows of an epoch of one window over all ranks, with `batch_size` rows per block and rank."""
        return self.num_replicas * batch_size * math.ceil(self.window / self.repeats)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield runs of equally large blocks until the rows are used up: count, first row, rows per block and rank."""
        first_row = 0
        ends = [first for first, _ in self.sizes[1:]]
        for (first, size), end in itertools.zip_longest(self.sizes, ends):
            available = (self.size - first_row) // (size * self.num_replicas)
            count = available if end is None else min(available, end - first)
            yield count, first_row, size
            if end is not None and count < end - first:
                return
            first_row += count * size * self.num_replicas

    def _rows(self, block: int) -> slice:
        """Return this rank's slice of the permutation for a block."""
        remaining = block
        for count, first_row, size in self._runs():
            if remaining < count:
                start = first_row + (remaining * self.num_replicas + self.rank) * size
                return slice(start, start + size)
            remaining -= count
        raise IndexError(f"block {block} is out of range: the epoch has {block - remaining} blocks")

    def __len__(self) -> int:
        steps = sum(count for count, _, _ in self._runs()) * self.repeats
        return steps - steps % self.window

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        step = self.start
        while step < len(self):
            yield order[self._rows(step // self.repeats)].tolist()
            step += 1


class EvalSampler(DistributedSampler[list[int]]):
    """Yields each row once, in order, in blocks of at most `batch_size` rows, with equally many blocks on every rank.

    Equal counts keep ranks synchronized when evaluation reduces across them. In return, block sizes can differ by one
    row, and with `batch_size` 1 a block can have two rows.
    """

    def __init__(self, dataset: Sized, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.size = len(dataset)
        self.blocks = min(math.ceil(self.size / (num_replicas * batch_size)), self.size // num_replicas)

    def __len__(self) -> int:
        return self.blocks

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        blocks = np.array_split(np.arange(self.size), self.blocks * self.num_replicas)
        return (block.tolist() for block in blocks[self.rank :: self.num_replicas])


class ResumableLoader(DataLoader[Any]):
    """DataLoader that starts at the Trainer's current batch, so that a resumed run continues with the next batch.

    Args:
        dataset: The data set, indexed with a whole block at a time: `dataset[[3, 1, 4]]`.
        sampler: Its `start` and `seed` are set when an iteration begins.
        trainer: Provides the progress and, by its module, the `seed`. Without a Trainer iterations begin at step 0.
        collate_fn: Makes a batch of the rows of a block.
        num_workers: Data loading processes. Rarely useful, since the rows are tokenized and in memory.

    Attributes:
        on_begin: Called with the first step when an iteration begins.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        sampler: BlockSampler,
        trainer: lightning.Trainer | None = None,
        collate_fn: Callable[[Any], Any] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            dataset,  # type: ignore[arg-type]
            batch_size=None,
            sampler=sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )
        self.blocks = sampler
        self.trainer = trainer
        self.on_begin: Callable[[int], None] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.trainer is not None:
            self.blocks.seed = getattr(self.trainer.lightning_module, "seed", self.blocks.seed)
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
            self.blocks.start = progress.ready if self.trainer.training else 0
        if self.on_begin is not None:
            self.on_begin(self.blocks.start)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the Trainer tracks the position. Without this method the Trainer warns."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the empty state."""
