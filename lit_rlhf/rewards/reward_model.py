"""A reward model: a sequence-classification model with one label, read at the last token of prompt and completion."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_rlhf.models.attention import use_cpu_attention
from lit_rlhf.models.length_groups import groups_of_like_length, padded_size
from lit_rlhf.models.shared_prompt import Forward, fallback_reason, hidden_states, probe_input, rms, shared_features
from lit_rlhf.tokenization import encode_completion, encode_prompt
from lit_rlhf.types import Prompts, Text

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of a completion."""


class RewardModel:
    """The score of a decoder-only sequence-classification model, such as the one that `RewardModeling` exports.

    Text goes through the model's own tokenizer and messages through its own chat template. A completion that ended by
    itself ends with the model's EOS token, one that was cut does not, as in training. A prompt is computed once for its
    completions, where the model allows that and it saves arithmetic. This is a plain object and no module: no
    checkpoint and no optimizer knows it. `setup` loads the weights, or the first call does, onto the CPU.

    Args:
        model: A folder, a hub id, or a model in memory (which is then put in evaluation mode and moved).
        tokenizer: By default the one that lies with the model; must be given for a model in memory.
        batch_size: Completions a forward pass.
        max_length: Longest input in tokens; a longer one loses the start of its prompt. By default nothing is cut, and
            an input longer than the model's positions is an error.
        dtype: Of the weights that are loaded: "auto" for the dtype they were saved in, or "float32", "bfloat16", ...
            The trainer's precision does not reach them.
        chat_template_kwargs: Handed to the chat template.

    Raises:
        ValueError: If the model can't be read, is no sequence-classification model or has more than one label, or if
            `batch_size` or `max_length` is out of range. All this is found out before weights are loaded.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        dtype: str = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch_size of a reward model must be at least 1, not {batch_size}")
        if isinstance(model, PreTrainedModel) and tokenizer is None:
            raise ValueError("a reward model in memory needs its tokenizer: RewardModel(model, tokenizer=tokenizer)")
        self.source = model
        self.tokenizer_source = model if tokenizer is None else tokenizer
        self.batch_size = batch_size
        self.dtype = dtype
        self.chat_template_kwargs = chat_template_kwargs
        config = model.config if isinstance(model, PreTrainedModel) else _read_config(model)
        _check_one_label(config, _called(model))
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if max_length is not None and not 1 <= max_length <= (positions or max_length):
            raise ValueError(f"max_length={max_length} does not fit {_called(model)}: it has {positions} positions")
        self.max_length = max_length
        self.positions = positions
        self._model: Any = None
        self._tokenizer: Any = None
        self._shares_prompt: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `setup` loads, so that no copy carries it into a checkpoint."""
        return {**self.__dict__, "_model": None, "_tokenizer": None}

    def setup(self, device: torch.device | str) -> None:
        """Load tokenizer and weights, unless they are there, and move them to `device`.

        Raises:
            ValueError: If the weights lack the head that gives the score, or the tokenizer more tokens than the model.
        """
        if self._model is None:
            self._tokenizer = _load_tokenizer(self.tokenizer_source)
            self._model = self.source if isinstance(self.source, PreTrainedModel) else _load(self.source, self.dtype)
            vocabulary = self._model.config.get_text_config().vocab_size
            if len(self._tokenizer) > vocabulary:
                raise ValueError(
                    f"the tokenizer of {_called(self.source)} has {len(self._tokenizer)} tokens, "
                    f"the model only {vocabulary}: they do not belong together"
                )
        use_cpu_attention(self._model)
        self._model.to(device).eval()
        self._find_out()

    @torch.no_grad()
    def _find_out(self) -> None:
        """Find out, once, whether the completions of a prompt can share it; say so where they can't."""
        if self._shares_prompt is not None:
            return
        model = self._model
        reason: str | None = f"a {type(model).__name__} has no linear head called `score`"
        if isinstance(getattr(model, "score", None), torch.nn.Linear):
            prompts, ends = probe_input(model.get_input_embeddings().weight.shape[0], model.device)
            starts = [ids[mask].tolist() for ids, mask in zip(prompts.tokens, prompts.mask, strict=True)]
            rows = [(starts[i // 2], end) for i, end in enumerate(ends.tolist())]
            whole = [start + end for start, end in rows]
            expected, alone = self._forward(whole), torch.cat([self._forward([row]) for row in whole])
            reason = fallback_reason(lambda: self._forward_shared(rows), expected, rms(expected - alone))
        self._shares_prompt = reason is None
        if reason is not None:
            rank_zero_info(f"{_called(self.source)} computes each prompt once a completion: {reason}")

    @property
    def _hidden(self) -> Forward:
        return functools.partial(hidden_states, self._model.base_model)

    @torch.no_grad()
    def __call__(
        self, prompts: list[Text], completions: list[Text], finished: list[bool] | None = None
    ) -> Float[Tensor, " completions"]:
        """Score completions.

        Args:
            prompts: Strings or messages, one a completion.
            completions: Strings or messages.
            finished: Whether each completion ended by itself; by default all did.

        Returns:
            The scores in float32, on the CPU.

        Raises:
            ValueError: If an input is longer than the model's positions, and no `max_length` was chosen.
        """
        if self._model is None:
            self.setup("cpu")
        finished = [True] * len(completions) if finished is None else finished
        starts: dict[int, list[int]] = {}  # a prompt stands here once a completion, and is encoded once
        for prompt in prompts:
            if id(prompt) not in starts:
                starts[id(prompt)] = encode_prompt(self._tokenizer, prompt, self.chat_template_kwargs)
        rows = [
            self._encode(prompt, starts[id(prompt)], completion, ended)
            for prompt, completion, ended in zip(prompts, completions, finished, strict=True)
        ]
        size = min(self.batch_size, self._model.config.get_text_config().vocab_size - 1)  # leaves an id to pad with
        scores = torch.empty(len(rows), dtype=torch.float32)
        if (shared := self._shared_batches(rows, size)) is not None:
            for batch in shared:
                scores[batch] = self._forward_shared([rows[i] for i in batch]).cpu()
            return scores
        whole = [start + end for start, end in rows]
        for batch in _batches(size, len(rows), lambda i: -len(whole[i])):  # the largest first
            for group in groups_of_like_length([len(whole[i]) for i in batch]):
                chosen = [batch[i] for i in group]
                scores[chosen] = self._forward([whole[i] for i in chosen]).cpu()
        return scores

    def _shared_batches(self, rows: list[Row], size: int) -> list[list[int]] | None:
        """Batches in which the completions of a prompt stand together; None where to share it would save nothing."""
        starts = [tuple(start) for start, _ in rows]
        if not self._shares_prompt or not all(starts) or len(set(starts)) == len(starts):
            return None
        batches = _batches(size, len(rows), lambda i: (-len(starts[i]), starts[i]))
        shared = 0
        for batch in batches:
            prompts = {starts[i] for i in batch}
            shared += len(prompts) * max(map(len, prompts)) + padded_size([len(rows[i][1]) for i in batch])
        alone = sum(
            padded_size([sum(map(len, rows[i])) for i in batch])
            for batch in _batches(size, len(rows), lambda i: -sum(map(len, rows[i])))
        )
        return batches if shared < alone else None

    def _encode(self, prompt: Text, start: list[int], completion: Text, finished: bool) -> Row:
        end = encode_completion(self._tokenizer, prompt, completion, finished, self.chat_template_kwargs)
        length = len(start) + len(end)
        if self.max_length is not None:
            cut = max(0, length - self.max_length)
            return start[cut:], end[max(0, cut - len(start)) :]
        if self.positions is not None and length > self.positions:
            raise ValueError(
                f"an input of {length} tokens exceeds the {self.positions} positions of {_called(self.source)}: "
                f"use shorter prompts, or max_length={self.positions} to cut the start of the prompt"
            )
        return start, end

    def _forward_shared(self, rows: list[Row]) -> Float[Tensor, " batch"]:
        """Score rows of a prompt and a completion, each prompt computed once."""
        device, places = self._model.device, dict[tuple[int, ...], int]()
        owner = torch.tensor([places.setdefault(tuple(start), len(places)) for start, _ in rows])
        lengths = torch.tensor([len(start) for start in places])
        width, length = int(lengths.max()), max(len(end) for _, end in rows) + 1
        tokens = torch.tensor([[start[-1]] * (width - len(start)) + [*start] for start in places])
        mask = torch.arange(width) >= width - lengths.unsqueeze(1)
        prompts = Prompts(tokens, mask, torch.arange(len(places))).to(device)
        # one token more than each completion has: what stands before that one is read
        ends = torch.tensor([end + [start[-1]] * (length - len(end)) for start, end in rows], device=device)
        read = [len(end) for _, end in rows]
        with torch.autocast(device.type, enabled=False):
            fed = [count + 1 for count in read]
            features = shared_features(self._hidden, self._model.config, prompts, ends, owner, fed)
            scores: Tensor = self._model.score(features[range(len(rows)), read])
        return scores.squeeze(-1).float()

    def _forward(self, rows: list[list[int]]) -> Float[Tensor, " batch"]:
        device, length = self._model.device, max(map(len, rows))
        ends = {row[-1] for row in rows}
        pad = next(i for i in range(len(ends) + 1) if i not in ends)
        tokens = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
        places = torch.arange(length, device=device)
        mask = (places < torch.tensor([[len(row)] for row in rows], device=device)).long()
        with _configured(self._model.config, pad), torch.autocast(device.type, enabled=False):
            scores: Tensor = self._model(input_ids=tokens, attention_mask=mask).logits
        return scores.squeeze(-1).float()


def _batches(size: int, count: int, key: Callable[[int], Any]) -> list[list[int]]:
    """Rows in the order of their key, cut into batches."""
    order = sorted(range(count), key=key)
    return [order[i : i + size] for i in range(0, count, size)]


@contextmanager
def _configured(config: PreTrainedConfig, pad: int) -> Iterator[None]:
    """Set the id that padding is told by, to one that no row of the batch ends with, and leave the cache out.

    The model reads its score at the last token that is not `pad_token_id`. With any fixed id, EOS above all, a row that
    itself ends with that id would be read too early.
    """
    changes = {"pad_token_id": pad, "use_cache": False}
    configs = [config, config.get_text_config()]
    before = [{name: getattr(c, name, None) for name in changes} for c in configs]
    try:
        for c in configs:
            vars(c).update(changes)
        yield
    finally:
        for c, values in zip(configs, before, strict=True):
            vars(c).update(values)


def _called(model: str | Path | PreTrainedModel) -> str:
    return f"the reward model {type(model).__name__ if isinstance(model, PreTrainedModel) else str(model)!r}"


def _read_config(model: str | Path) -> PreTrainedConfig:
    folder = Path(model)
    if folder.is_dir() and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{_called(model)} is a PEFT adapter: merge it into its base model and save that")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
        return config
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{_called(model)} has no readable config: give a folder with a config.json or a hub id"
        ) from error


def _check_one_label(config: PreTrainedConfig, called: str) -> None:
    architectures = config.architectures or []
    if architectures and not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise ValueError(
            f"{called} is a {architectures[0]}, not a sequence-classification model: train one with RewardModeling"
        )
    if config.num_labels != 1:
        raise ValueError(
            f"{called} has {config.num_labels} labels, but a reward is one number: use a model with one label"
        )


def _load(model: str | Path, dtype: str) -> PreTrainedModel:
    loaded: PreTrainedModel
    loaded, report = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{_called(model)} lacks the weights {missing}, which would be random: train it as a reward model"
        )
    return loaded


def _load_tokenizer(source: Any) -> PreTrainedTokenizerBase:
    return source if isinstance(source, PreTrainedTokenizerBase) else AutoTokenizer.from_pretrained(source)
