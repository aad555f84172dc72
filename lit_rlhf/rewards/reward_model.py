"""A reward model: a sequence-classification model with one label, read at the last token of prompt and completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import InputError
from lit_rlhf.models.classifiers import check_one_label, read_config
from lit_rlhf.models.length_groups import groups_of_similar_length, padded_size
from lit_rlhf.models.loading import check_vocabulary
from lit_rlhf.models.offload import OF_REWARD_MODEL, OffloadedWeights, check_offload
from lit_rlhf.models.out_of_memory import FittingRows
from lit_rlhf.models.pretrained import is_classifier, load_tokenizer, shared_options, without_weights
from lit_rlhf.models.scalar import ScalarModel
from lit_rlhf.models.sharding import Sharding
from lit_rlhf.tokenization import check_template_kwargs, encode_completion, encode_prompt
from lit_rlhf.types import Prompts, Text

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of a completion."""


class RewardModel:
    """The score of a decoder-only sequence-classification model, such as the one that `RewardModeling` exports.

    Text goes through the model's own tokenizer, and messages through its own chat template. A finished completion ends
    with the model's EOS token and a truncated one does not, as in training. A prompt is computed once for all its
    completions if the model allows it and it saves arithmetic. This is a plain object and not a module, so it is in no
    checkpoint and no optimizer. `setup(device)` loads the weights; without it the first call loads them onto the CPU.

    Args:
        model: A folder, a hub id, or a model in memory (which is put in evaluation mode and moved).
        tokenizer: By default the model's own; required for a model in memory.
        batch_size: Completions per forward pass.
        max_length: Maximum number of tokens of an input; longer ones lose the start of their prompt. By default nothing
            is truncated, and an input longer than the model's positions is an error.
        dtype: Dtype of loaded weights: "auto" for the dtype they were saved in, or "float32", "bfloat16", ...; the
            trainer's precision does not change it.
        chat_template_kwargs: Arguments of the chat template.
        parse_special_tokens: Whether special tokens in prompts that are plain strings are encoded as such, as in the
            data modules. Those that a policy has spelled out in its completions are always text.
        load: Other options of `from_pretrained`, such as `{"revision": "v2"}`, for the tokenizer, too.
        offload: Whether the weights stay in main memory between uses.

    Raises:
        ValueError: If the model can't be read, is not a sequence-classification model or has more than one label, or if
            `batch_size` or `max_length` is out of range. All this is checked before weights are loaded.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        dtype: str = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        parse_special_tokens: bool = True,
        load: dict[str, Any] | None = None,
        offload: bool = False,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        if batch_size < 1:
            raise InputError(f"the batch_size of a reward model must be at least 1, not {batch_size}")
        if isinstance(model, PreTrainedModel) and tokenizer is None:
            raise InputError("a reward model in memory needs its tokenizer: RewardModel(model, tokenizer=tokenizer)")
        self.pretrained = model
        self.tokenizer_source = model if tokenizer is None else tokenizer
        self.batch_size = batch_size
        self._fitting_rows = FittingRows(_called(model), "a smaller batch_size of the reward model", "completions")
        self.load_options = {"dtype": dtype, **(load or {})}
        check_template_kwargs(chat_template_kwargs or {})
        self.chat_template_kwargs, self.parse_special_tokens = chat_template_kwargs, parse_special_tokens
        if isinstance(model, PreTrainedModel):
            config: Any = model.config
        else:
            config = read_config(model, _called(model), **self.load_options)
        if config.architectures and not is_classifier(config):
            raise InputError(
                f"{_called(model)} is a {config.architectures[0]}, not a sequence-classification model: train one with "
                "RewardModeling"
            )
        check_one_label(config, _called(model))
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if max_length is not None and not 1 <= max_length <= (positions or max_length):
            raise InputError(f"max_length={max_length} does not fit {_called(model)}: it has {positions} positions")
        self.max_length, self.offload = max_length, offload
        self.positions = positions
        self._scorer: ScalarModel | None = None
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `setup` loads, so that no checkpoint holds it."""
        return {**self.__dict__, "_scorer": None, "_tokenizer": None}

    def setup(self, device: torch.device | str, sharding: Sharding | None = None) -> None:
        """Load tokenizer and weights on first use, and move them to `device`.

        Args:
            device: The device.
            sharding: How to shard the weights over ranks. All ranks must then score equally often.

        Raises:
            ValueError: If the weights lack the head, the tokenizer has more tokens than the model, or the weights are
                to be both sharded and offloaded.
        """
        check_offload([OF_REWARD_MODEL] * self.offload, torch.device(device), sharding is not None)
        if self._scorer is None:
            own = self.tokenizer_source is self.pretrained
            options = self.load_options if own else shared_options(self.load_options)
            self._tokenizer = self.tokenizer_source
            if not isinstance(self._tokenizer, PreTrainedTokenizerBase):
                self._tokenizer = load_tokenizer(self._tokenizer, **options)
            name = _called(self.pretrained)
            if isinstance(self.pretrained, PreTrainedModel):
                scorer = ScalarModel(self.pretrained, name, trained=False)
            else:
                with without_weights(sharding is not None and not sharding.is_first):
                    scorer = ScalarModel.from_pretrained(
                        self.pretrained, name="reward model", trained=False, **self.load_options
                    )
            check_vocabulary(scorer.classifier, self._tokenizer)
            if sharding is not None:
                scorer.shard(replace(sharding, precision=MixedPrecisionPolicy()))
            self._scorer = scorer
        self._scorer.eval()
        if not self.offload:
            self._scorer.to(device)
        elif (offloaded := self._scorer.model_forward.offloaded) is not None:
            offloaded.device = torch.device(device)
        else:
            self._scorer.model_forward.offloaded = OffloadedWeights(self._scorer, device)
        self._scorer.probe()

    @torch.no_grad()
    def __call__(
        self, prompts: list[Text], completions: list[Text], finished: list[bool] | None = None
    ) -> Float[Tensor, " completions"]:
        """Score completions.

        Args:
            prompts: Strings or messages, one per completion.
            completions: Strings or messages.
            finished: Whether each completion is finished, and not truncated; by default all are.

        Returns:
            The scores in float32, on the CPU.

        Raises:
            ValueError: If an input is longer than the model's positions, and no `max_length` was chosen.
        """
        if self._scorer is None:
            self.setup("cpu")
        assert self._scorer is not None
        finished = [True] * len(completions) if finished is None else finished
        starts: list[list[int]] = []
        for i, prompt in enumerate(prompts):  # a prompt is given once per completion, and encoded once
            again = i > 0 and prompt == prompts[i - 1]
            starts.append(
                starts[-1]
                if again
                else self._encode_text(encode_prompt, prompt, parse_special_tokens=self.parse_special_tokens)
            )
        rows = [self._encode(*row) for row in zip(prompts, starts, completions, finished, strict=True)]
        scores = torch.empty(len(rows), dtype=torch.float32)
        forward = self._scorer.model_forward
        with forward.gathered(), torch.autocast(forward.device.type, enabled=False):
            if (shared := self._shared_batches(rows, self.batch_size)) is not None:
                for batch in shared:
                    scores[batch] = self._in_parts(self._shared_scores, [rows[i] for i in batch])
                return scores
            joined = [start + end for start, end in rows]
            for batch in _batches(self.batch_size, len(rows), lambda i: -len(joined[i])):  # the largest first
                for group in groups_of_similar_length([len(joined[i]) for i in batch]):
                    chosen = [batch[i] for i in group]
                    scores[chosen] = self._in_parts(self._scorer.plain_scores, [joined[i] for i in chosen])
            return scores

    def _in_parts(self, score: Callable[[list[Any]], Tensor], rows: list[Any]) -> Float[Tensor, " batch"]:
        parts = self._fitting_rows.in_parts(lambda part: score(rows[part]).float().cpu(), len(rows), 1)
        return torch.cat(parts)

    def _shared_batches(self, rows: list[Row], size: int) -> list[list[int]] | None:
        """Return batches with the completions of a prompt next to each other; None if sharing it saves nothing."""
        assert self._scorer is not None
        starts = [tuple(start) for start, _ in rows]
        if not self._scorer.shares_prompt or not all(starts) or len(set(starts)) == len(starts):
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

    def _encode_text(self, encode: Callable[..., list[int]], prompt: Text, *text: Any, **options: Any) -> list[int]:
        try:
            return encode(self._tokenizer, prompt, *text, template_kwargs=self.chat_template_kwargs, **options)
        except InputError as error:
            raise InputError(
                f"{_called(self.pretrained)} can't read the prompt {str(prompt)[:200]}: {error}"
            ) from error

    def _encode(self, prompt: Text, start: list[int], completion: Text, finished: bool) -> Row:
        end = self._encode_text(encode_completion, prompt, completion, finished, parse_special_tokens=False)
        length = len(start) + len(end)
        if self.max_length is not None:
            cut = max(0, length - self.max_length)
            return start[cut:], end[max(0, cut - len(start)) :]
        if self.positions is not None and length > self.positions:
            raise InputError(
                f"an input of {length} tokens exceeds the {self.positions} positions of {_called(self.pretrained)}: "
                f"use shorter prompts, or max_length={self.positions} to cut the start of the prompt"
            )
        return start, end

    def _shared_scores(self, rows: list[Row]) -> Float[Tensor, " batch"]:
        """Score rows of a prompt and a completion, with each prompt computed once."""
        assert self._scorer is not None
        device, places = self._scorer.model_forward.device, dict[tuple[int, ...], int]()
        owner = torch.tensor([places.setdefault(tuple(start), len(places)) for start, _ in rows])
        lengths = torch.tensor([len(start) for start in places])
        width, length = int(lengths.max()), max(len(end) for _, end in rows)
        tokens = torch.tensor([[start[-1]] * (width - len(start)) + [*start] for start in places])
        mask = torch.arange(width) >= width - lengths.unsqueeze(1)
        prompts = Prompts(tokens, mask, torch.arange(len(places))).to(device)
        ends = torch.tensor([end + [start[-1]] * (length - len(end)) for start, end in rows], device=device)
        return self._scorer.shared_scores(prompts, ends.long(), owner, [len(end) for _, end in rows])


def _batches(size: int, count: int, key: Callable[[int], Any]) -> list[list[int]]:
    """Return the rows in the order of their key, split into batches."""
    order = sorted(range(count), key=key)
    return [order[i : i + size] for i in range(0, count, size)]


def _called(model: str | Path | PreTrainedModel) -> str:
    return f"the reward model {type(model).__name__ if isinstance(model, PreTrainedModel) else str(model)!r}"
