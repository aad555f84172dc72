"""Data modules: prompts to sample from, demonstrations to imitate, preference pairs to learn from."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning
from torch.utils.data import DataLoader

from lit_rlhf.data import checks, encoding
from lit_rlhf.data.collate import collate_demonstrations, collate_preferences, collate_prompts
from lit_rlhf.data.encoding import Encoded, EncodedRows, Encoder
from lit_rlhf.data.formats import Example, read_demonstration, read_preference, read_prompt
from lit_rlhf.data.sampler import BlockSampler, EvalSampler, ResumableLoader
from lit_rlhf.data.sources import Row, Source, load_rows
from lit_rlhf.data.split import hold_out
from lit_rlhf.errors import InputError
from lit_rlhf.tokenization import check_template_kwargs, pad_token_id
from lit_rlhf.types import Demonstrations, Preferences, Prompts, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IGNORED_WARNINGS = (
    ".*does not have many workers",  # rows are tokenized and in memory; a batch takes less than a millisecond
    "Total length of `list` across ranks is zero",  # no validation was requested
)


class TextData(lightning.LightningDataModule, ABC):
    """Base of the data modules. `setup` reads, checks and tokenizes all rows, before a model is loaded.

    The tokenizer is the LightningModule's. Without a Trainer, as in a notebook, set it yourself:
    `data.tokenizer = tokenizer; data.setup(); batch = next(iter(data.train_dataloader()))`.

    Args:
        train: Training rows, in any of TRL's formats: a json, jsonl, csv or parquet file, a folder of them, a saved
            dataset, a hub id (`"owner/name:config#split"`), a list of dicts, or a `datasets.Dataset`.
        val: Rows for validation, test and prediction: another source, or the number (an int) or share (a float below
            1) of `train` rows to hold out. None: no validation.
        split: Which rows are held out: random ones, the same in every run, or the last ones.
        batch_size: Rows per step and device; for prompts, the prompts of a rollout. Typically 8 to 64.
        eval_batch_size: Rows per step and device in validation, test and prediction. Defaults to `batch_size`.
        prompt_column: Name of the prompt column. Defaults to `prompt`.
        max_prompt_tokens: Maximum prompt length.
        truncation: Whether longer prompts are dropped, or truncated to their end.
        transform: Function from row to row, applied first. Rows for which it returns None are dropped.
        drop_duplicates: Keep only the first row of each prompt.
        chat_template_kwargs: Arguments of the chat template, such as `{"enable_thinking": False}`.
        parse_special_tokens: Whether special tokens in plain strings, which may be rendered chats, are parsed, or text.
        num_workers: Data loading processes. Rarely useful, since rows are in memory.

    Raises:
        ValueError: At construction if a number is out of range; in `setup` if the data can't be used.
    """

    batch_type: type[Record]
    """Type of the batches."""
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
        parse_special_tokens: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        checks.check_minimum(1, optional=False, batch_size=batch_size)
        checks.check_minimum(1, eval_batch_size=eval_batch_size, max_prompt_tokens=max_prompt_tokens)
        checks.check_minimum(0, optional=False, num_workers=num_workers)
        checks.check_val(val)
        checks.check_choice("split", split, ("random", "last"))
        checks.check_choice("truncation", truncation, ("drop", "truncate"))
        check_template_kwargs(chat_template_kwargs or {})
        self.train, self.val, self.split = train, val, split
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.prompt_column, self.transform, self.drop_duplicates = prompt_column, transform, drop_duplicates
        self.max_prompt_tokens, self.truncation = max_prompt_tokens, truncation
        self.max_completion_tokens: int | None = None
        self.chat_template_kwargs, self.num_workers = chat_template_kwargs or {}, num_workers
        self.parse_special_tokens, self.all_turns = parse_special_tokens, False
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.train_set: EncodedRows | None = None
        self.val_set: EncodedRows | None = None
        self._encoded_with: PreTrainedTokenizerBase | None = None

    def columns(self, part: Literal["train", "val"]) -> list[str] | None:
        """Names of the columns that rewards receive for the training or validation rows; None without such rows."""
        rows = self.train_set if part == "train" else self.val_set
        return list(rows[0].example.columns) if rows else None

    @property
    def max_sequence_length(self) -> int:
        """Largest number of tokens of a prompt and its completion, if the data have completions; 0 before `setup`."""
        rows = (row for part in (self.train_set, self.val_set) for row in part or ())
        return max((len(row.prompt) + max(map(len, row.completions), default=0) for row in rows), default=0)

    @abstractmethod
    def read(self, row: Row) -> Example:
        """Read one row."""

    def check(self, examples: dict[int, Example]) -> None:
        """Raise a ValueError if an example can't be used. Accepts everything by default."""

    def setup(self, stage: str = "fit") -> None:
        """Read, check and tokenize the rows that `stage` needs."""
        checks.check_sources(stage, self.train, self.val, getattr(self.trainer, "overfit_batches", 0))
        for message in _IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        tokenizer = self._tokenizer()
        if tokenizer is not self._encoded_with:
            self.train_set = self.val_set = None
            self._encoded_with = tokenizer
        self._load(stage, tokenizer)
        num_replicas = self._ranks()["num_replicas"]
        if stage == "fit":
            rows, min_rows = len(self.train_set or ()), self._sampler().min_rows
            checks.check_train_size(rows, min_rows, self.batch_size, num_replicas)
        if self.val_set is not None:
            checks.check_val_size(len(self.val_set), num_replicas)

    def _load(self, stage: str, tokenizer: PreTrainedTokenizerBase) -> None:
        holds_out = isinstance(self.val, (int, float))
        if holds_out and self.train is None:
            raise InputError(f"val={self.val} is a part of data.train, which is not set: set it, or give val a source")
        if self.train_set is None and self.train is not None and (stage == "fit" or holds_out):
            rows = self._encode(self.train, ("train",), tokenizer)
            if isinstance(self.val, (int, float)):
                rows, held_out = hold_out(rows, self.val, self.split)
                self.val_set = EncodedRows(held_out)
            self.train_set = EncodedRows(rows)
        if self.val_set is None and self.val is not None and not isinstance(self.val, (int, float)):
            self.val_set = EncodedRows(self._encode(self.val, ("validation", "test"), tokenizer))

    def _encode(self, source: Source, prefer: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
        examples = encoding.read_examples(load_rows(source, prefer), self.read, self.transform)
        self.check(examples)
        if self.drop_duplicates:
            examples = encoding.drop_duplicates(examples)
        options = (self.max_prompt_tokens, self.max_completion_tokens, self.truncation, self.chat_template_kwargs)
        return Encoder(tokenizer, *options, self.parse_special_tokens, self.all_turns)(examples)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is not None:
            return self.tokenizer
        if self.trainer is None:
            raise InputError("there is no tokenizer without a Trainer: set data.tokenizer before data.setup()")
        return cast("PreTrainedTokenizerBase", self.trainer.lightning_module.tokenizer)

    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return dict(num_replicas=1, rank=0)
        return dict(num_replicas=self.trainer.world_size, rank=self.trainer.global_rank)

    def _sampler(self) -> BlockSampler:
        assert self.train_set is not None
        if self.trainer is None:
            return BlockSampler(self.train_set, self.batch_size)
        repeats = getattr(self.trainer.lightning_module, "steps_per_rollout", 1)
        window = dict(repeats=repeats, accumulate=self.trainer.accumulate_grad_batches)
        return BlockSampler(self.train_set, self.batch_size, **self._ranks(), **window)

    def _collate(self) -> Callable[[list[Encoded]], Record]:
        assert self._encoded_with is not None
        # a module-level function: a bound method would send the Trainer to worker processes
        return functools.partial(type(self).collate, pad_id=pad_token_id(self._encoded_with) or 0)

    def train_dataloader(self) -> ResumableLoader:
        """Return a loader of shuffled batches; each batch is repeated for all training steps of its rollout."""
        assert self.train_set is not None, "call setup() first"
        return ResumableLoader(self.train_set, self._sampler(), self.trainer, self._collate(), self.num_workers)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return a loader of the held-out rows in order, or an empty list without such rows."""
        return self.in_order(self.val_set)

    def in_order(self, rows: EncodedRows | None) -> DataLoader[Any] | list[Any]:
        """Return a loader that yields each row once, in order, distributed over the ranks."""
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
        """Return the loader of validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the loader of validation."""
        return self.val_dataloader()


class PromptData(TextData):
    """Prompts to sample completions for. Yields `Prompts`; rewards receive all other columns."""

    batch_type = Prompts
    collate = staticmethod(collate_prompts)

    def read(self, row: Row) -> Example:
        """Read one row: `prompt`, or the prompt of a demonstration or preference."""
        return read_prompt(row, self.prompt_column)

    def check(self, examples: dict[int, Example]) -> None:
        """Raise a ValueError if a prompt is empty."""
        checks.check_prompts(examples)


class DemonstrationData(TextData):
    """Completions to imitate. Yields `Demonstrations` with one sample per prompt.

    Args:
        train: Training rows; see `TextData`.
        completion_column: Name of the completion column. Defaults to `completion`, `messages` or `text`.
        assistant_turns: Which assistant turns are learned: the last (of `completion`, all of them), or all.
        max_completion_tokens: Maximum completion length, EOS token included. `truncation` applies to longer ones too;
            a truncated completion keeps its beginning.
        **rest: See `TextData`.
    """

    batch_type = Demonstrations
    collate = staticmethod(collate_demonstrations)

    def __init__(
        self,
        train: Source | None = None,
        *,
        completion_column: str | None = None,
        assistant_turns: Literal["last", "all"] = "last",
        max_completion_tokens: int | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(train, **rest)
        checks.check_minimum(1, max_completion_tokens=max_completion_tokens)
        checks.check_choice("assistant_turns", assistant_turns, ("last", "all"))
        self.completion_column, self.max_completion_tokens = completion_column, max_completion_tokens
        self.all_turns = assistant_turns == "all"

    def read(self, row: Row) -> Example:
        """Read one row: `prompt` and `completion`, `messages`, or `text`."""
        return read_demonstration(row, self.prompt_column, self.completion_column)


class PreferenceData(TextData):
    """Pairs of completions of the same prompt. Yields `Preferences`; pairs of equal completions are dropped.

    Args:
        train: Training rows; see `TextData`.
        chosen_column: Name of the column of chosen completions. Defaults to `chosen`.
        rejected_column: Name of the column of rejected completions. Defaults to `rejected`.
        max_completion_tokens: Maximum completion length, EOS token included. `truncation` applies to longer ones too;
            a truncated completion keeps its beginning.
        **rest: See `TextData`.
    """

    batch_type = Preferences
    collate = staticmethod(collate_preferences)

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
        checks.check_minimum(1, max_completion_tokens=max_completion_tokens)
        self.chosen_column, self.rejected_column = chosen_column, rejected_column
        self.max_completion_tokens = max_completion_tokens

    def read(self, row: Row) -> Example:
        """Read one row: `prompt`, `chosen` and `rejected`, or only the last two, with the prompt as common prefix."""
        return read_preference(row, self.prompt_column, self.chosen_column, self.rejected_column)
