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
        batch_size: Rows of one rank in one block.
        num_replicas: Ranks.
        rank: This rank.
        repeats: Steps that share one block.
        accumulate: Steps that share one update. An epoch is cut to whole windows of `max(accumulate, repeats)` steps,
            since the Trainer steps the optimizer early in the last window of an epoch.

    Attributes:
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
        self.batch_size = batch_size
        self.repeats = repeats
        self.window = max(accumulate, repeats)
        self.start = 0

    @property
    def needed(self) -> int:
        """Rows that the shortest epoch takes, on all ranks together."""
        return self.num_replicas * self.batch_size * math.ceil(self.window / self.repeats)

    def __len__(self) -> int:
        steps = self.size // (self.num_replicas * self.batch_size) * self.repeats
        return steps - steps % self.window

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        for step in range(self.start, len(self)):
            block = step // self.repeats * self.num_replicas + self.rank
            yield order[block * self.batch_size : (block + 1) * self.batch_size].tolist()


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

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.trainer is not None:
            self.blocks.seed = getattr(self.trainer.lightning_module, "seed", self.blocks.seed)
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
            self.blocks.start = progress.ready if self.trainer.training else 0
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the place is the Trainer's. That the method exists tells the Trainer not to warn."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
