"""The records that flow through a training step, and the legend of their axes.

Axis names, here and in every signature:

    prompts   n   rows of a batch; one row is one prompt
    samples   k   completions sampled for each prompt (the group)
    tokens    t   tokens of a completion, padded on the right
    context   p   tokens of a prompt, padded on the left
    vocabulary    entries of the tokenizer

A group is a row of an array, so indexing the first axis never splits it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_rlhf.errors import InputError

R = TypeVar("R", bound="Record")
RolloutT = TypeVar("RolloutT", bound="Rollout")

Message = dict[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "..."}`."""

Text = str | list[Message]
"""A prompt or a completion as rewards see it: a string, or messages if the data are conversational."""

Metrics = dict[str, float | Tensor | tuple[Tensor, Tensor]]
"""Loss metrics by name: a scalar, or `(values, mask)`, which is averaged over minibatches and ranks."""


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
    """Fields whose first axis is `prompts`. Indexing, moving and saving run over all fields, a subclass's too.

    Fields that a subclass of `Rollout` adds may be tensors `[prompts]`, `[prompts, samples]` or
    `[prompts, samples, tokens]`, lists `[prompts]` or lists of lists `[prompts][samples]`, `Completions`, or dicts of
    these.

    Treat records as immutable and make changed copies with `replace`. They are not frozen because Lightning refuses
    frozen dataclasses when it casts a batch (the precisions `bf16-true` and `64-true`).
    """

    def map(self: R, on_tensor: Callable[[Tensor], Any], on_list: Callable[[list[Any]], Any] = lambda x: x) -> R:
        """Apply `on_tensor` to every tensor and `on_list` to every list, in nested records and dicts too."""
        values = {f.name: _walk(getattr(self, f.name), on_tensor, on_list) for f in dataclasses.fields(self)}
        return type(self)(**values)

    def rows(self: R, index: slice) -> R:
        """Return the prompts that `index` selects, with everything that belongs to them."""
        return self.map(lambda tensor: tensor[index], lambda items: items[index])

    def at(self: R, rows: Sequence[int]) -> R:
        """Return the prompts at these positions, in this order."""
        return self.map(lambda tensor: tensor[list(rows)], lambda items: [items[row] for row in rows if items])

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
        mask: True at tokens, False at padding.
        index: Row number of each prompt in the data set; part of the counter that seeds its sampling noise.
        text: The prompts as rewards see them: strings, or lists of messages.
        columns: Every other column of the data set, one list entry per prompt.
        template_kwargs: Arguments of the chat template for each row; empty if there are none.
        parse_special_tokens: Whether special tokens in plain strings are encoded as such, not as text.
    """

    tokens: Int[Tensor, "prompts context"]
    mask: Bool[Tensor, "prompts context"]
    index: Int[Tensor, " prompts"]
    text: list[Any] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    template_kwargs: list[dict[str, Any]] = field(default_factory=list)
    parse_special_tokens: bool = True

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def trim(self) -> Prompts:
        """Remove the padding columns that all rows share."""
        start = self.tokens.shape[1] - int(self.mask.sum(1).max())
        return self.replace(tokens=self.tokens[:, start:], mask=self.mask[:, start:])


@dataclass
class Completions(Record):
    """Completions sampled from a policy.

    Attributes:
        tokens: Token ids including the EOS token, padded on the right.
        mask: True up to and including the last token of the completion.
        logprobs: Log-probability of each token at sampling time, in nats, at least float32, 0 where masked.
        finished: True if the completion ended with an EOS token or a stop string, False if it was truncated.
        entropy: Entropy of the next-token distribution before each token, at the temperature but without top-p and
            top-k, in nats; None if not measured.
        sampled_mass: Probability mass that top-p, top-k and a minimum length leave to sample from; None if none of
            them applies.
    """

    tokens: Int[Tensor, "prompts samples tokens"]
    mask: Bool[Tensor, "prompts samples tokens"]
    logprobs: Float[Tensor, "prompts samples tokens"]
    finished: Bool[Tensor, "prompts samples"]
    entropy: Float[Tensor, "prompts samples tokens"] | None = None
    sampled_mass: Float[Tensor, "prompts samples tokens"] | None = None

    @property
    def lengths(self) -> Int[Tensor, "prompts samples"]:
        """Number of tokens of each completion, including the EOS token."""
        return self.mask.sum(-1)

    def ids(self) -> list[list[int]]:
        """Token ids of each completion without padding: a flat list, prompt by prompt, sample by sample."""
        tokens, mask = self.tokens.flatten(0, 1).cpu(), self.mask.flatten(0, 1).cpu()
        return [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]


@dataclass
class Rollout(Record):
    """Completions of a batch of prompts with everything that a method needs to learn from them.

    Only `logprobs` (and fields of the same kind that a method adds in `evaluate`) carries gradient.

    Attributes:
        prompts: The prompts.
        completions: Their sampled completions.
        reference_logprobs: Log-probability of each token under the reference policy, in nats, 0 where masked; None
            without a reference.
        rewards: Weighted sum of the rewards of each completion, 0 where `valid` is False.
        component_rewards: Each reward by name, before its weight; NaN where the reward returned None.
        valid: False if no reward scored the completion, it was masked or has no rank: no loss has it.
        returns: The objective: `rewards - kl_coef * k1` with k1 summed over the tokens; the rewards alone with a
            `kl_penalty` in the loss. Token-level rewards are separate.
        token_rewards: Weighted sum of the token-level rewards, 0 where masked; None if there are none.
        texts: The completions as the rewards saw them, `texts[prompt][sample]`.
        reward_extras: Values that rewards reported with `log_extra`, by name, `[prompt][sample]`.
        advantages: One number per completion or per token, once the method has computed it.
        old_logprobs: Log-probability of each token under the policy before the first update on this rollout, from the
            training forward; NaN until known; None for methods without an importance ratio.
        logprobs: Log-probability of each token under the current policy, with gradient; set by `evaluate`.
    """

    prompts: Prompts
    completions: Completions
    reference_logprobs: Float[Tensor, "prompts samples tokens"] | None
    rewards: Float[Tensor, "prompts samples"]
    component_rewards: dict[str, Float[Tensor, "prompts samples"]]
    valid: Bool[Tensor, "prompts samples"]
    returns: Float[Tensor, "prompts samples"]
    token_rewards: Float[Tensor, "prompts samples tokens"] | None = None
    texts: list[list[Any]] = field(default_factory=list)
    reward_extras: dict[str, list[list[Any]]] = field(default_factory=dict)
    advantages: Float[Tensor, "prompts samples"] | Float[Tensor, "prompts samples tokens"] | None = None
    old_logprobs: Float[Tensor, "prompts samples tokens"] | None = None
    logprobs: Float[Tensor, "prompts samples tokens"] | None = None

    @property
    def loss_mask(self) -> Bool[Tensor, "prompts samples tokens"]:
        """True at the tokens of valid completions."""
        return self.valid.unsqueeze(-1) & self.completions.mask

    @property
    def total_rewards(self) -> Float[Tensor, "prompts samples"]:
        """Reward of each completion plus the sum of its token-level rewards."""
        return self.rewards + self._token_reward_sum

    @property
    def total_returns(self) -> Float[Tensor, "prompts samples"]:
        """Return of each completion plus the sum of its token-level rewards."""
        return self.returns + self._token_reward_sum

    @property
    def _token_reward_sum(self) -> Tensor:
        if self.token_rewards is None:
            return torch.zeros_like(self.rewards)
        return self.token_rewards.masked_fill(~self.completions.mask, 0.0).sum(-1)

    def samples(self: RolloutT, index: slice) -> RolloutT:
        """Return the samples of each prompt that `index` selects. Group statistics must have been computed before."""
        return self._cut(
            lambda tensor: tensor[:, index] if tensor.ndim > 1 else tensor,
            lambda items: [row[index] if isinstance(row, list) else row for row in items],
        )

    def pick(self: RolloutT, sample: Int[Tensor, "prompts picked"]) -> RolloutT:
        """Return some samples of each prompt, at the indices in `sample`."""
        rows, chosen = torch.arange(len(sample), device=sample.device).unsqueeze(1), sample.tolist()
        return self._cut(
            lambda tensor: tensor[rows, sample] if tensor.ndim > 1 else tensor,
            lambda items: [
                [row[i] for i in picked] if isinstance(row, list) else row
                for row, picked in zip(items, chosen, strict=False)
            ],
        )

    def _cut(
        self: RolloutT, on_tensor: Callable[[Tensor], Tensor], on_list: Callable[[list[Any]], list[Any]]
    ) -> RolloutT:
        names = [f.name for f in dataclasses.fields(self) if f.name != "prompts"]
        return self.replace(**{name: _walk(getattr(self, name), on_tensor, on_list) for name in names})

    def trim(self: RolloutT) -> RolloutT:
        """Remove the padding that all prompts share and the padding that all completions share."""
        length, tokens = int(self.completions.lengths.max()), self.completions.tokens.shape[2]
        cut = self.map(lambda tensor: tensor[:, :, :length] if tensor.shape[2:] == (tokens,) else tensor)
        return cut.replace(prompts=self.prompts.trim())

    def state(self) -> dict[str, Any]:
        """Return the rollout for a checkpoint: nested dicts of CPU tensors and plain values.

        The prompts are left out but for their index (the data module yields them again), and so are the
        `reward_extras`, which are any objects and only logged.
        """
        return {**_plain(self.to("cpu"), skip={"prompts", "reward_extras"}), "index": self.prompts.index.cpu()}

    @classmethod
    def from_state(cls: type[RolloutT], state: dict[str, Any], prompts: Prompts, some: bool = False) -> RolloutT:
        """Rebuild a rollout from `state` for the same prompts, or with `some` for those of them that it has.

        Raises:
            ValueError: If these are other prompts.
        """
        fields = {name: _restored(value) for name, value in state.items()}
        before, now = fields.pop("index").tolist(), prompts.index.tolist()
        rows = [now.index(i) for i in before if i in now] if some else list(range(len(now)))
        if before != [now[row] for row in rows]:
            raise InputError(
                f"the checkpoint was saved inside a rollout of {len(before)} rows {before[:4]}, but the data yield "
                f"{len(now)} rows {now[:4]}: resume with the data and data.batch_size of the run, or between rollouts"
            )
        return cls(prompts=prompts.at(rows), **fields)


def _plain(record: Record, skip: set[str]) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name not in skip}
    return {name: _plain(value, set()) if isinstance(value, Record) else value for name, value in values.items()}


def _restored(value: Any) -> Any:
    names = {f.name for f in dataclasses.fields(Completions)}
    return Completions(**value) if isinstance(value, dict) and value.keys() == names else value


@dataclass
class Demonstrations(Record):
    """Completions given by the data, one per prompt (k = 1), for the policy to imitate.

    Attributes:
        prompts: The prompts.
        tokens: Token ids including the EOS token, padded on the right.
        mask: True at tokens, False at padding.
        learned: True at tokens that an assistant wrote, False at turns of others in between; None without such turns.
    """

    prompts: Prompts
    tokens: Int[Tensor, "prompts samples tokens"]
    mask: Bool[Tensor, "prompts samples tokens"]
    learned: Bool[Tensor, "prompts samples tokens"] | None = None

    @property
    def loss_mask(self) -> Bool[Tensor, "prompts samples tokens"]:
        """True at the tokens to learn."""
        return self.mask if self.learned is None else self.mask & self.learned


@dataclass
class Preferences(Demonstrations):
    """Pairs of completions of one prompt (k = 2): the chosen one first, the rejected one second."""
