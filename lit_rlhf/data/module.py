"""The data modules: prompts to sample from, demonstrations to imitate, preferences to learn."""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lit_rlhf.data import encoding
from lit_rlhf.data.encoding import Encoded, EncodedRows, Encoder
from lit_rlhf.data.formats import Example, read_demonstration, read_preference, read_prompt
from lit_rlhf.data.sampler import BlockSampler, EvalSampler, ResumableLoader
from lit_rlhf.data.sources import Row, Source, load_rows
from lit_rlhf.tokenization import pad_token_id
from lit_rlhf.types import Demonstrations, Preferences, Prompts, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOT_HERE = (
    ".*does not have many workers",  # rows wait in memory, tokenised, and a batch takes less than a millisecond
    "Total length of `list` across ranks is zero",  # no validation was asked for
)

SPLIT_SEED = 0
"""Of the random split, whatever the seed of the run: runs are compared on the same held-out rows."""


class TextData(lightning.LightningDataModule):
    """What the data modules share. Everything is read, checked and tokenised in `setup`, before a model is loaded.

    The tokenizer is that of the LightningModule. In a notebook, without a Trainer, set one before:
    `data.tokenizer = tokenizer; data.setup(); batch = next(iter(data.train_dataloader()))`.

    Args:
        train: Rows to train on: a json, jsonl, csv or parquet file, a folder of them, a saved dataset, a hub id
            (`"owner/name:config#split"`), a list of dicts, or a `datasets.Dataset`. In any of TRL's formats.
        val: What validates, tests and predicts: a source of its own, or how many rows of `train` to hold out (a whole
            number) or which share of them (a number below 1). None: no validation.
        split: Which rows are held out: random ones, always the same, or the last.
        batch_size: Rows in a step of one device; for prompts, those of a rollout. Typically 8 to 64.
        eval_batch_size: The same outside training; as `batch_size` where None.
        prompt_column: The column of the prompts, where it is not `prompt`.
        max_prompt_tokens: The longest prompt.
        truncation: Whether longer prompts are dropped, or truncated to their end.
        transform: A function from row to row, applied first; where it returns None, the row is dropped.
        drop_duplicates: Keep only the first of the rows that share a prompt.
        chat_template_kwargs: Handed to the chat template, such as `{"enable_thinking": False}`.
        num_workers: Processes that load; rarely of use, since rows wait in memory.

    Raises:
        ValueError: In `setup`, where the data can't be trained on; the sentence says why and what helps.
    """

    batch_type: type[Record]
    """What a batch is."""
    collate: Callable[..., Record]

    def __init__(
        self,
        train: Source | None = None,
        val: int | float | Source | None = None,
        split: Literal["random", "last"] = "random",
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        prompt_column: str | None = None,
        max_prompt_tokens: int | None = None,
        truncation: Literal["drop", "truncate"] = "drop",
        transform: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
        drop_duplicates: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.val, self.split = train, val, split
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.prompt_column, self.transform, self.drop_duplicates = prompt_column, transform, drop_duplicates
        self.max_prompt_tokens, self.truncation = max_prompt_tokens, truncation
        self.max_completion_tokens: int | None = None
        self.chat_template_kwargs, self.num_workers = chat_template_kwargs or {}, num_workers
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.train_set: EncodedRows | None = None
        self.val_set: EncodedRows | None = None
        self._encoded_with: PreTrainedTokenizerBase | None = None
        _check_numbers(self)

    def columns(self, part: Literal["train", "val"]) -> list[str] | None:
        """Names of the columns that the rewards get with one part of the data, or None where it is not there."""
        rows = self.train_set if part == "train" else self.val_set
        return list(rows[0].example.columns) if rows else None

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the longest prompt with its completion, if it has one; 0 before `setup`."""
        rows = (row for part in (self.train_set, self.val_set) for row in part or ())
        return max((len(row.prompt) + max(map(len, row.completions), default=0) for row in rows), default=0)

    @abstractmethod
    def read(self, row: Row) -> Example:
        """Read one row."""

    def check(self, examples: dict[int, Example]) -> None:
        """Refuse examples that can't be used, by a ValueError."""

    def setup(self, stage: str = "fit") -> None:
        """Read, check and tokenise what `stage` needs."""
        if stage == "fit" and self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ValueError(
                f"overfit_batches={self.trainer.overfit_batches} would swap the sampler, and a rollout would be "  # type: ignore[attr-defined]
                "trained on with other prompts than its own: give a train set of a few rows instead"
            )
        if stage == "fit" and self.train is None:
            raise ValueError("there is nothing to train on: set data.train to a file, a hub id or a list of rows")
        if stage != "fit" and self.val is None:
            raise ValueError(
                f"there is nothing to {TrainerFn(stage).value}: set data.val to a file, a hub id, or a number of rows"
            )
        for message in _NOT_HERE:
            warnings.filterwarnings("ignore", message=message)
        tokenizer = self._tokenizer()
        if tokenizer is not self._encoded_with:
            self.train_set = self.val_set = None
            self._encoded_with = tokenizer
        self._load(stage, tokenizer)
        self._check_sizes(stage)

    def _load(self, stage: str, tokenizer: PreTrainedTokenizerBase) -> None:
        held_out = isinstance(self.val, (int, float))
        if held_out and self.train is None:
            raise ValueError(f"val={self.val} is a part of data.train, which is not set: set it, or give val a source")
        if self.train_set is None and self.train is not None and (stage == "fit" or held_out):
            rows = self._encode(self.train, ("train",), tokenizer)
            if held_out:
                rows, held = self._hold_out(rows)
                self.val_set = EncodedRows(held)
            self.train_set = EncodedRows(rows)
        if self.val_set is None and self.val is not None and not isinstance(self.val, (int, float)):
            self.val_set = EncodedRows(self._encode(self.val, ("validation", "test"), tokenizer))

    def _encode(self, source: Source, prefer: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
        examples = encoding.read_examples(load_rows(source, prefer), self.read, self.transform)
        self.check(examples)
        if self.drop_duplicates:
            examples = encoding.drop_duplicates(examples)
        limits = (self.max_prompt_tokens, self.max_completion_tokens, self.truncation)
        return Encoder(tokenizer, *limits, self.chat_template_kwargs)(examples)

    def _hold_out(self, rows: list[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
        assert isinstance(self.val, (int, float))
        count = self.val if isinstance(self.val, int) else max(1, round(self.val * len(rows)))
        if count >= len(rows):
            raise ValueError(
                f"val={self.val} holds out {count} of {len(rows)} rows and leaves none to train on: lower it"
            )
        order = np.arange(len(rows))
        if self.split == "random":
            order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
        kept, held = np.sort(order[: len(rows) - count]), np.sort(order[len(rows) - count :])
        return [rows[i] for i in kept], [rows[i] for i in held]

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is not None:
            return self.tokenizer
        if self.trainer is None:
            raise ValueError("there is no tokenizer outside a Trainer: set data.tokenizer before data.setup()")
        return cast("PreTrainedTokenizerBase", self.trainer.lightning_module.tokenizer)

    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return dict(num_replicas=1, rank=0)
        return dict(num_replicas=self.trainer.world_size, rank=self.trainer.global_rank)

    def _check_sizes(self, stage: str) -> None:
        ranks = self._ranks()["num_replicas"]
        if stage == "fit":
            sampler, found = self._sampler(), len(self.train_set or ())
            if found < sampler.needed:
                raise ValueError(
                    f"{found} rows to train on are fewer than the {sampler.needed} that one update takes (batch_size "
                    f"{self.batch_size} x devices {ranks} x blocks {sampler.needed // (self.batch_size * ranks)}): "
                    "give more rows, or lower data.batch_size or trainer.accumulate_grad_batches"
                )
        if self.val_set is not None and len(self.val_set) < ranks:
            raise ValueError(f"{len(self.val_set)} rows to validate are fewer than the {ranks} devices: hold out more")

    def _sampler(self) -> BlockSampler:
        assert self.train_set is not None
        if self.trainer is None:
            return BlockSampler(self.train_set, self.batch_size)
        repeats = getattr(self.trainer.lightning_module, "steps_per_rollout", 1)
        window = dict(repeats=repeats, accumulate=self.trainer.accumulate_grad_batches)
        return BlockSampler(self.train_set, self.batch_size, **self._ranks(), **window)

    def _collate(self) -> Callable[[list[Encoded]], Record]:
        assert self._encoded_with is not None
        # a function of the module's, and no method of this object: worker processes would be sent the Trainer with it
        return functools.partial(type(self).collate, pad_id=pad_token_id(self._encoded_with))

    def train_dataloader(self) -> ResumableLoader:
        """Blocks of rows in an order of their own each epoch, each repeated as the method asks."""
        assert self.train_set is not None, "call setup() first"
        return ResumableLoader(self.train_set, self._sampler(), self.trainer, self._collate(), self.num_workers)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The held-out rows in order, each once; no loader where there are none."""
        return self.in_order(self.val_set)

    def in_order(self, rows: EncodedRows | None) -> DataLoader[Any] | list[Any]:
        """Rows in order, each once, spread over the ranks."""
        if rows is None:
            return []
        return DataLoader(
            rows,  # type: ignore[arg-type]
            batch_size=None,
            sampler=EvalSampler(rows, self.eval_batch_size, **self._ranks()),
            collate_fn=self._collate(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The same rows as in validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The same rows as in validation."""
        return self.val_dataloader()


def _check_numbers(data: TextData) -> None:
    least = dict(batch_size=1, eval_batch_size=1, max_prompt_tokens=1, max_completion_tokens=1, num_workers=0)
    for name, number in least.items():
        value = getattr(data, name)
        if value is not None and value < number:
            raise ValueError(f"{name}={value}: it must be at least {number}")
    if (isinstance(data.val, float) and not 0 < data.val < 1) or (isinstance(data.val, int) and data.val < 1):
        raise ValueError(f"val={data.val}: give a number of rows, a share between 0 and 1, a source, or nothing")
    for name, allowed in (("split", ("random", "last")), ("truncation", ("drop", "truncate"))):
        if getattr(data, name) not in allowed:
            raise ValueError(f"{name}={getattr(data, name)!r}: it must be one of {', '.join(map(repr, allowed))}")


class PromptData(TextData):
    """Prompts to sample completions of; every other column reaches the rewards. Yields `Prompts`."""

    batch_type = Prompts
    collate = staticmethod(encoding.collate_prompts)

    def read(self, row: Row) -> Example:
        """Read one row: `prompt`, or the prompt of a demonstration or preference."""
        return read_prompt(row, self.prompt_column)

    def check(self, examples: dict[int, Example]) -> None:
        """Refuse empty prompts."""
        encoding.refuse_empty(examples)


class DemonstrationData(TextData):
    """Completions to imitate. Yields `Demonstrations` of one sample.

    Args:
        train: Rows to train on, as in `TextData`.
        completion_column: The column of the completions, where it is not `completion`, `messages` or `text`.
        max_completion_tokens: The longest completion, its EOS token included; longer ones go by `truncation` too, and
            a truncated one keeps its beginning.
        **rest: As in `TextData`.
    """

    batch_type = Demonstrations
    collate = staticmethod(encoding.collate_demonstrations)

    def __init__(
        self,
        train: Source | None = None,
        *,
        completion_column: str | None = None,
        max_completion_tokens: int | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(train, **rest)
        self.completion_column, self.max_completion_tokens = completion_column, max_completion_tokens
        _check_numbers(self)

    def read(self, row: Row) -> Example:
        """Read one row: `prompt` and `completion`, `messages`, or `text`."""
        return read_demonstration(row, self.prompt_column, self.completion_column)


class PreferenceData(TextData):
    """Pairs of completions of one prompt. Yields `Preferences`; pairs of equal completions are dropped.

    Args:
        train: Rows to train on, as in `TextData`.
        chosen_column: The column of the better completions, where it is not `chosen`.
        rejected_column: The column of the worse completions, where it is not `rejected`.
        max_completion_tokens: The longest completion, its EOS token included; longer ones go by `truncation` too, and
            a truncated one keeps its beginning.
        **rest: As in `TextData`.
    """

    batch_type = Preferences
    collate = staticmethod(encoding.collate_preferences)

    def __init__(
        self,
        train: Source | None = None,
        *,
        chosen_column: str | None = None,
        rejected_column: str | None = None,
        max_completion_tokens: int | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(train, **rest)
        self.chosen_column, self.rejected_column = chosen_column, rejected_column
        self.max_completion_tokens = max_completion_tokens
        _check_numbers(self)

    def read(self, row: Row) -> Example:
        """Read one row: `prompt`, `chosen` and `rejected`, or the last two where they begin with the prompt."""
        return read_preference(row, self.prompt_column, self.chosen_column, self.rejected_column)
