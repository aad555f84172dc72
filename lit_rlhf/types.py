"""The records that flow through a training step, and the legend of their axes.

Axis names, here and in every signature:

    prompts   n   rows of a batch; one row is one prompt
    samples   k   completions sampled for each prompt
    tokens    t   tokens of a completion, padded on the right
    context   p   tokens of a prompt, padded on the left
    vocabulary    entries of the tokenizer

A group, the k completions of one prompt, is a row of an array, so nothing that cuts or moves rows can tear it apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

R = TypeVar("R", bound="Record")
RolloutT = TypeVar("RolloutT", bound="Rollout")

Message = dict[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "..."}`."""

Text = str | list[Message]
"""A prompt or a completion as rewards see it: a plain string, or messages where the data is conversational."""


def _walk(value: Any, on_tensor: Callable[[Tensor], Any], on_list: Callable[[list[Any]], Any]) -> Any:
    if isinstance(value, Tensor):
        return on_tensor(value)
    if isinstance(value, Record):
        return value.map(on_tensor, on_list)
    if isinstance(value, dict):
        return {key: _walk(item, on_tensor, on_list) for key, item in value.items()}
    if isinstance(value, list):
        return on_list(value)
    return value


@dataclass
class Record:
    """Arrays whose first axis is `prompts`. Cutting, moving and saving run over the fields, a subclass's too.

    What a subclass of `Rollout` adds may be `[prompts]`, `[prompts, samples]` or `[prompts, samples, tokens]`, other
    `Completions`, or dicts of these.

    Treat records as constants: `replace` makes a changed one. They are not frozen because Lightning refuses frozen
    dataclasses where it casts a batch (the precisions `bf16-true` and `64-true`).
    """

    def map(self: R, on_tensor: Callable[[Tensor], Any], on_list: Callable[[list[Any]], Any] = lambda x: x) -> R:
        """Apply `on_tensor` to every tensor and `on_list` to every list, in nested records and dicts too."""
        values = {f.name: _walk(getattr(self, f.name), on_tensor, on_list) for f in dataclasses.fields(self)}
        return type(self)(**values)

    def rows(self: R, index: slice) -> R:
        """Return the prompts that `index` selects, with all that belongs to them."""
        return self.map(lambda tensor: tensor[index], lambda items: items[index])

    def to(self: R, device: torch.device | str) -> R:
        """Return the record with every tensor on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def replace(self: R, **changes: Any) -> R:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass
class Prompts(Record):
    """A batch of prompts.

    Attributes:
        tokens: Token ids, padded on the left.
        mask: True where `tokens` is a token and not padding.
        index: Each prompt's place in the data set, which also addresses its sampling noise.
        text: The prompts as rewards see them: strings, or lists of messages.
        columns: Every other column of the data set, one list entry a prompt.
        template_kwargs: What each row hands to the chat template; may be left out where there is nothing.
    """

    tokens: Int[Tensor, "prompts context"]
    mask: Bool[Tensor, "prompts context"]
    index: Int[Tensor, " prompts"]
    text: list[Any] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    template_kwargs: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def trim(self) -> Prompts:
        """Cut the padding that all rows share."""
        start = self.tokens.shape[1] - int(self.mask.sum(1).max())
        return self.replace(tokens=self.tokens[:, start:], mask=self.mask[:, start:])


@dataclass
class Completions(Record):
    """What a policy sampled.

    Attributes:
        tokens: Token ids, the end-of-sequence token included, padded on the right.
        mask: True where a token counts: up to and including the end of the completion.
        logprobs: Log-probability of each token when it was sampled, in nats, at least float32, 0 where masked.
        finished: True where the completion ended by itself (an EOS token or a stop string), False where it was cut.
        entropy: Entropy before each token, at the temperature but without top-p and top-k, in nats; None: not measured.
        sampled_mass: Probability that top-p, top-k and a minimum length left to draw from, or None where none applies.
    """

    tokens: Int[Tensor, "prompts samples tokens"]
    mask: Bool[Tensor, "prompts samples tokens"]
    logprobs: Float[Tensor, "prompts samples tokens"]
    finished: Bool[Tensor, "prompts samples"]
    entropy: Float[Tensor, "prompts samples tokens"] | None = None
    sampled_mass: Float[Tensor, "prompts samples tokens"] | None = None

    @property
    def lengths(self) -> Int[Tensor, "prompts samples"]:
        """Tokens of each completion, the end-of-sequence token included."""
        return self.mask.sum(-1)

    def ids(self) -> list[list[int]]:
        """Token ids of each completion without padding, prompt by prompt, sample by sample."""
        tokens, mask = self.tokens.flatten(0, 1).cpu(), self.mask.flatten(0, 1).cpu()
        return [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]


@dataclass
class Rollout(Record):
    """Completions of a batch of prompts with all that a method needs to learn from them. Nothing here carries gradient.

    Attributes:
        prompts: The prompts.
        completions: What was sampled for them.
        reference_logprobs: Log-probability of each token under the reference, in nats, 0 where masked.
        rewards: Weighted sum of the rewards of the whole completion, 0 where `valid` is False.
        parts: Each reward by name, before its weight; NaN where a reward had no opinion.
        valid: False where a completion has no reward at all or was left out: it counts nowhere.
        returns: What a method optimises: `rewards - kl_coef * k1`, the KL estimate summed over the completion; with
            `kl_penalty` k2 or k3 that estimate, and the rewards alone where the KL is in the loss.
        token_rewards: Weighted sum of the token-level rewards, 0 where masked, or None where there are none.
        advantages: One number a completion or a token, set once the method has computed it.
    """

    prompts: Prompts
    completions: Completions
    reference_logprobs: Float[Tensor, "prompts samples tokens"]
    rewards: Float[Tensor, "prompts samples"]
    parts: dict[str, Float[Tensor, "prompts samples"]]
    valid: Bool[Tensor, "prompts samples"]
    returns: Float[Tensor, "prompts samples"]
    token_rewards: Float[Tensor, "prompts samples tokens"] | None = None
    advantages: Float[Tensor, "prompts samples"] | Float[Tensor, "prompts samples tokens"] | None = None

    @property
    def counted(self) -> Bool[Tensor, "prompts samples tokens"]:
        """True at the tokens of the completions that count."""
        return self.valid.unsqueeze(-1) & self.completions.mask

    def samples(self: RolloutT, index: slice) -> RolloutT:
        """Return the samples of each prompt that `index` selects; only for what no longer looks across a group."""
        return self._cut(lambda tensor: tensor[:, index] if tensor.ndim > 1 else tensor)

    def pick(self: RolloutT, sample: Int[Tensor, " prompts"]) -> RolloutT:
        """Return one sample of each prompt: the one whose number `sample` gives."""
        rows = torch.arange(len(sample), device=sample.device)
        return self._cut(lambda tensor: tensor[rows, sample].unsqueeze(1) if tensor.ndim > 1 else tensor)

    def _cut(self: RolloutT, on_tensor: Callable[[Tensor], Tensor]) -> RolloutT:
        names = [f.name for f in dataclasses.fields(self) if f.name != "prompts"]
        return self.replace(**{name: _walk(getattr(self, name), on_tensor, lambda items: items) for name in names})

    def trim(self: RolloutT) -> RolloutT:
        """Cut the padding that all prompts and the padding that all completions share."""
        length, tokens = int(self.completions.lengths.max()), self.completions.tokens.shape[2]
        cut = self.map(lambda tensor: tensor[:, :, :length] if tensor.shape[2:] == (tokens,) else tensor)
        return cut.replace(prompts=self.prompts.trim())

    def state(self) -> dict[str, Any]:
        """Return everything but the prompts, of these their index, as nested dicts of CPU tensors, for a checkpoint."""
        return {**_plain(self.to("cpu"), skip={"prompts"}), "index": self.prompts.index.cpu()}

    @classmethod
    def from_state(cls: type[RolloutT], state: dict[str, Any], prompts: Prompts) -> RolloutT:
        """Rebuild what `state` returned, for the prompts that it was made of.

        Raises:
            ValueError: If these are other prompts.
        """
        fields = {name: _restored(value) for name, value in state.items()}
        before, now = fields.pop("index").tolist(), prompts.index.tolist()
        if before != now:
            raise ValueError(
                f"the checkpoint was saved inside a rollout of the rows {before[:4]}, and the data now hand over "
                f"{now[:4]} ({len(before)} and {len(now)} rows): resume with the data and the data.batch_size of the "
                "run, or from a checkpoint between two rollouts"
            )
        return cls(prompts=prompts, **fields)


def _plain(record: Record, skip: set[str]) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name not in skip}
    return {name: _plain(value, set()) if isinstance(value, Record) else value for name, value in values.items()}


def _restored(value: Any) -> Any:
    names = {f.name for f in dataclasses.fields(Completions)}
    return Completions(**value) if isinstance(value, dict) and value.keys() == names else value


@dataclass
class Demonstrations(Record):
    """Completions that the data give: k = 1, what a policy should write.

    Attributes:
        prompts: The prompts.
        tokens: Token ids, the EOS token included, padded on the right.
        mask: True where a token counts.
    """

    prompts: Prompts
    tokens: Int[Tensor, "prompts samples tokens"]
    mask: Bool[Tensor, "prompts samples tokens"]


@dataclass
class Preferences(Demonstrations):
    """Pairs of completions of one prompt: k = 2, the chosen one first, the rejected one second."""
