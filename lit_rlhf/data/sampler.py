"""Which rows each training step gets, and how a resumed run finds its place.

One rollout is trained on for R steps, so its prompts must come R times in a row; with automatic optimization the
Trainer counts steps, and everything that it derives from the length of the loader (progress, `max_steps`,
accumulation, validation) is right only if the repetition is in the sampler. Hence:

- The sampler is a `DistributedSampler`: any other kind the Trainer would replace under several processes.
- It yields whole blocks (lists of indices) and the loader has `batch_size=None`: a batch sampler would be replaced too.
- Its order depends on the seed and the epoch alone, and its place on the Trainer's own count of batches, which a
  checkpoint holds. So there is no state to save.
- The loader's iterator is a generator, which looks for its place at the first `next()`. `iter()` is too early: at the
  start of a run the Trainer calls it before it has told the sampler the epoch, and worker processes would by then
  have been sent the first batches of a wrong one.
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
    """Yields the indices of a block of rows, `repeats` times in a row, then of the next block.

    A block of all ranks together is `num_replicas * batch_size` rows of a permutation, and rank r takes the r-th part
    of it. So two ranks see exactly the rows that one process with twice the batch size sees. Rows that fill no whole
    block, and blocks that fill no whole window, wait for another epoch's permutation.

    Args:
        dataset: What is indexed; only its length is used.
        batch_size: Rows of one rank in one block, until `sizes` says otherwise.
        num_replicas: Ranks.
        rank: This rank.
        repeats: Steps that share one block.
        accumulate: Steps that share one update. An epoch is cut to whole windows of `max(accumulate, repeats)` steps,
            since the Trainer steps the optimizer early in the last window of an epoch.

    Attributes:
        sizes: From which block of the epoch on a block has how many rows of one rank; the first entry is block 0. What
            has been handed over must not be changed; the length counts what is to come by it.
        seed: Of the permutation, together with the epoch.
        start: The step of the epoch to begin with; the length counts all steps of the epoch all the same.
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
    def needed(self) -> int:
        """Rows that the shortest epoch takes, on all ranks together."""
        return self.rows_for(max(size for _, size in self.sizes))

    def rows_for(self, batch_size: int) -> int:
        """Rows that an epoch of one window takes, on all ranks together, if a block has `batch_size` rows of each."""
        return self.num_replicas * batch_size * math.ceil(self.window / self.repeats)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Runs of equal blocks, as long as rows last: how many, where they begin, rows of one rank in each."""
        begin = 0
        ends = [first for first, _ in self.sizes[1:]]
        for (first, size), end in itertools.zip_longest(self.sizes, ends):
            fit = (self.size - begin) // (size * self.num_replicas)
            count = fit if end is None else min(fit, end - first)
            yield count, begin, size
            if end is not None and count < end - first:
                return
            begin += count * size * self.num_replicas

    def _rows(self, block: int) -> slice:
        """Where in the permutation this rank's part of a block stands."""
        for count, begin, size in self._runs():
            if block < count:
                begin += (block * self.num_replicas + self.rank) * size
                return slice(begin, begin + size)
            block -= count
        raise IndexError(f"an epoch has no block {block} more")

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
    """Yields each row once, in order, in blocks of at most `batch_size` rows, the same number of blocks on every rank.

    Equal numbers keep ranks in step where evaluation reduces across them; the price is blocks that differ by a row
    (and, where `batch_size` is 1, blocks of two rows).
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
    """A loader that begins where the Trainer's progress says: after a resume, at the batch that would have come next.

    Args:
        dataset: Indexed with a whole block at a time: `dataset[[3, 1, 4]]`.
        sampler: Its `start` and `seed` are set when the iteration begins.
        trainer: Whose progress counts and whose module has the `seed`; without one the iteration begins at step 0.
        collate_fn: Makes a batch of what the data set returns for a block.
        num_workers: Processes that load. One is rarely of use, since the rows are tokenised and in memory.

    Attributes:
        on_begin: Called with the step that an iteration begins with, when it does.
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
        """Return nothing: the place is the Trainer's. That the method exists tells the Trainer not to warn."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
