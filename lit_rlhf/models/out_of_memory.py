"""Computations without gradient that ran out of memory are repeated with fewer prompts at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda

from lit_rlhf.errors import InputError
from lit_rlhf.local_warnings import warn_locally

T = TypeVar("T")

MESSAGES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of the messages of devices that have no error class of their own for this."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of the host was too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


@dataclass
class FittingRows:
    """How many rows of a computation fit into memory; remembered for the run.

    Attributes:
        name: The computation, in messages.
        option: The option that makes it smaller from the start, in messages.
        unit: What a batch consists of, in messages.
        largest: Number of rows at a time (prompts times samples), once more have not fitted.
    """

    name: str
    option: str = "a larger --model.updates.num_minibatches or a smaller --data.batch_size"
    unit: str = "prompts"
    largest: int | None = None

    def in_parts(self, compute: Callable[[slice], T], prompts: int, samples: int, size: int | None = None) -> list[T]:
        """Compute a batch in parts: in halves, and halves of these, where a part runs out of memory.

        Args:
            compute: Computes the prompts of a slice. It must not depend on the other prompts.
            prompts: Number of prompts.
            samples: Number of rows of each.
            size: Number of prompts at a time to start with (None: all).

        Raises:
            ValueError: If a single prompt runs out of memory.
        """
        parts: list[T] = []
        start, size, too_many = 0, size or prompts, 0
        while start < prompts:
            count = size if self.largest is None else max(1, min(size, self.largest // samples))
            count = min(count, prompts - start)
            try:
                parts.append(compute(slice(start, start + count)))
            except Exception as error:  # `MemoryError` and the errors of each kind of device
                if not is_out_of_memory(error):
                    raise
                if count == 1:
                    raise InputError(
                        f"{self.name} ran out of memory with a single one of its {self.unit}: use fewer samples, "
                        "shorter prompts and completions, or a smaller model"
                    ) from error
                too_many, self.largest = too_many or count, count // 2 * samples
            else:
                start += count
                if too_many:
                    self._warn(too_many, count)
                too_many = 0
                continue
            garbage_collection_cuda()  # only here, since the error holds the tensors of its frames
        return parts

    def _warn(self, too_many: int, count: int) -> None:
        warn_locally(
            f"{self.name} ran out of memory with {too_many} {self.unit} at a time and continues with {count}, with "
            f"the same results: {self.option} does so from the start"
        )
