"""Models that return one number: critics (a value before each token) and reward models (a score at the last token)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from lit_rlhf import functional as F
from lit_rlhf.errors import InputError
from lit_rlhf.models.adapters import add_lora
from lit_rlhf.models.classifiers import check_one_label, check_reads_last_token, read_config
from lit_rlhf.models.forward import ModelForward, as_sampled
from lit_rlhf.models.loading import disable_dropout, embedding_rows, unwrapped
from lit_rlhf.models.out_of_memory import FittingRows
from lit_rlhf.models.pretrained import load_model
from lit_rlhf.models.probe import probe_scores
from lit_rlhf.models.sharding import ShardedWeights, Sharding
from lit_rlhf.models.shared_prompt import (
    TokenSequences,
    can_share,
    completion_features,
    fill_padding,
    filled_tokens,
    last_features,
    prompt_of_row,
    score_in_parts,
)
from lit_rlhf.types import Prompts

ScalarT = TypeVar("ScalarT", bound="ScalarModel")


class ScalarModel(nn.Module):
    """A sequence-classification model with one label.

    `values` reads its head before every token, `score` at the last token of a completion. Each prompt is computed once
    for all its completions if a probe on first use finds that the model allows it.

    Args:
        model: A `transformers` sequence-classification model with one label, or a PEFT model around one.
        name: Name in messages.
        trained: Whether it is trained: its dropout is then switched off.

    Raises:
        ValueError: If it has more than one label, or is an encoder.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, name: str, trained: bool = True) -> None:
        super().__init__()
        model = unwrapped(model)
        self.model, self.name = model, name
        check_reads_last_token(self.classifier, name)
        self._fitting_rows = FittingRows(name)
        check_one_label(self.classifier.config, name)
        self.model_forward = ModelForward(self.classifier, head="score")
        head = getattr(self.classifier, "score", None)
        self.model_forward.head_apart = isinstance(head, nn.Linear) or isinstance(self.model, PeftModel)
        if trained:
            disable_dropout(model)
        self.train(trained)  # Lightning warns of modules in evaluation mode

    @classmethod
    def from_pretrained(
        cls: type[ScalarT],
        source: str | Path,
        lora: dict[str, Any] | None = None,
        *,
        name: str = "model",
        trained: bool = True,
        zero_head: bool = False,
        **options: Any,
    ) -> ScalarT:
        """Load a model from a hub id or a folder.

        A model without such a head, such as a policy, gets a new one if it is to be trained.

        Args:
            source: The hub id or folder; `testbed` for the shipped policy.
            lora: Options of `peft.LoraConfig` to train an adapter and the head instead of all weights.
            name: Name in messages, such as `critic`.
            trained: See the class.
            zero_head: Whether a new head starts at zero, or near zero as `transformers` initializes it.
            **options: Options of `from_pretrained` of `transformers`. Weights load in float32 by default (`dtype`).

        Raises:
            ValueError: If it is an adapter, has more than one label, or lacks its head and is not to be trained.
        """
        name = f"the {name} {str(source)!r}"
        read_config(source, name, **options)
        model: Any
        model, new = load_model(AutoModelForSequenceClassification, source, name, True, **options, num_labels=1)
        if new and not trained:
            raise InputError(f"{name} lacks the weights {new}, which would be random: train it as a reward model")
        check_reads_last_token(model, name)
        if zero_head and any("score" in key for key in new):
            nn.init.zeros_(model.score.weight)
        if lora is not None:  # the head is trained: bfloat16, in which the frozen trunk may be, is too coarse for it
            model.score.float().register_forward_pre_hook(cast_input)
            model = add_lora(model, {**lora, "task_type": "SEQ_CLS"})
        return cls(model, name, trained)

    @property
    def classifier(self) -> Any:
        """The `transformers` model itself, inside the PEFT model if there is one."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.classifier.config

    @property
    def shares_prompt(self) -> bool:
        """Whether each prompt is computed once for all its completions; False before `probe`."""
        return bool(self.model_forward.shares_prompt)

    def probe(self) -> None:
        """Find out, once, whether the completions of a prompt can share it; log the reason if not."""
        if self.model_forward.shares_prompt is None:
            with self.model_forward.without_gradient():
                probe_scores(self.model_forward, self.plain_scores, self.shared_scores, self.name)

    def shard(self, sharding: Sharding) -> None:
        """Shard the weights over ranks, once."""
        if self.model_forward.sharded is None:
            self.model_forward.sharded = ShardedWeights(self, sharding, ["_values", "_score"])

    def values(self, prompts: Prompts, completions: TokenSequences) -> Float[Tensor, "prompts samples tokens"]:
        """Return a value before each token, at least float32, 0 where masked. Differentiable."""
        self.probe()
        return score_in_parts(self.model_forward, self._fitting_rows, self._values, prompts, completions)

    def _values(self, prompts: Prompts, completions: TokenSequences) -> Tensor:
        features = completion_features(self.model_forward, prompts, completions)
        return value_head(self.model_forward.head, features, completions)

    def score(self, prompts: Prompts, completions: TokenSequences) -> Float[Tensor, "prompts samples"]:
        """Return a score of each completion, read at its last token, at least float32. Differentiable."""
        self.probe()
        return score_in_parts(self.model_forward, self._fitting_rows, self._score, prompts, completions)

    def _score(self, prompts: Prompts, completions: TokenSequences) -> Float[Tensor, "prompts samples"]:
        n, k, _ = completions.tokens.shape
        mask = completions.mask.flatten(0, 1)
        with as_sampled(self.model):
            if can_share(self.model_forward):
                tokens, lengths = filled_tokens(prompts, completions), mask.sum(1).tolist()
                return self.shared_scores(fill_padding(prompts), tokens, prompt_of_row(n, k), lengths).view(n, k)
            starts = [ids[kept].tolist() for ids, kept in zip(prompts.tokens, prompts.mask, strict=True)]
            ends = [ids[kept].tolist() for ids, kept in zip(completions.tokens.flatten(0, 1), mask, strict=True)]
            return self.plain_scores([starts[i // k] + end for i, end in enumerate(ends)]).view(n, k)

    def shared_scores(
        self,
        prompts: Prompts,
        tokens: Int[Tensor, "rows tokens"],
        owner: Int[Tensor, " rows"],
        lengths: Sequence[int],
    ) -> Float[Tensor, " rows"]:
        """Score completions with each prompt computed once. Differentiable.

        Args:
            prompts: The prompts.
            tokens: Completions; their padding is any token.
            owner: The prompt of each completion.
            lengths: Number of tokens of each completion.
        """
        return apply_head(self.model_forward.head, last_features(self.model_forward, prompts, tokens, owner, lengths))

    def plain_scores(self, rows: list[list[int]]) -> Float[Tensor, " rows"]:
        """Score rows of token ids, prompt and completion in one, by the model's own forward. Differentiable."""
        device, length = self.model_forward.device, max(map(len, rows))
        ends = {row[-1] for row in rows}
        pad = next(i for i in range(len(ends) + 1) if i not in ends)
        if pad >= self.model_forward.vocabulary:  # every id ends a row, so none is left for the padding
            half = len(rows) // 2
            return torch.cat([self.plain_scores(rows[:half]), self.plain_scores(rows[half:])])
        tokens = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
        lengths = torch.tensor([[len(row)] for row in rows], device=device)
        mask = (torch.arange(length, device=device) < lengths).long()
        forward = self.model_forward
        with padding_id(self.config, pad), forward.fast_attention(), forward.checkpointed():
            scores: Tensor = self.classifier(input_ids=tokens, attention_mask=mask).logits
        return F.at_least_float32(scores.squeeze(-1))


class Critic(ScalarModel):
    """A value model: a `ScalarModel` with a decoder-only trunk that predicts the return before each token.

    The value of the first completion token is read at the last prompt token.

    Args:
        model: A `transformers` sequence-classification model with one label, such as a reward model, or a PEFT model
            around one.
        name: Name in messages.
        trained: Whether it is trained: its dropout is then switched off.

    Raises:
        ValueError: If the model has no such head.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, name: str = "the critic", trained: bool = True) -> None:
        super().__init__(model, name, trained)
        if not hasattr(self.classifier, "score"):
            raise InputError(f"{name} is a {type(self.classifier).__name__} without a linear head: give another model")
        self.model_forward.head_apart = True

    @classmethod
    def from_pretrained(cls, source: str | Path, lora: dict[str, Any] | None = None, **options: Any) -> Critic:
        """Load a critic: a reward model with its head, or a policy with a new head whose values start at 0.

        See `ScalarModel`.
        """
        return super().from_pretrained(source, lora, name="critic", zero_head=True, **options)

    def check_vocabulary(self, policy: Any) -> None:
        """Check that the critic embeds every token id that a causal language model can write.

        Raises:
            ValueError: If it embeds fewer.
        """
        known, written = embedding_rows(self.classifier), embedding_rows(policy)
        if known < written:
            raise InputError(
                f"the critic embeds {known} token ids and the policy {written}: give a critic with the same tokenizer, "
                "such as one that started from the same model"
            )


def apply_head(head: nn.Module, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch"]:
    """Apply a head of one output in its own precision, under autocast too; at least float32."""
    with torch.autocast(features.device.type, enabled=False):
        outputs: Tensor = head(features.to(next(head.parameters()).dtype)).squeeze(-1)
    return F.at_least_float32(outputs)


def value_head(
    head: nn.Module, features: Float[Tensor, "prompts samples tokens features"], completions: TokenSequences
) -> Float[Tensor, "prompts samples tokens"]:
    """Turn features into values, 0 where masked."""
    return apply_head(head, features).masked_fill(~completions.mask, 0.0)


def cast_input(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Cast a layer's input to the dtype of its weight."""
    return (args[0].to(next(layer.parameters()).dtype),)


@contextlib.contextmanager
def padding_id(config: PreTrainedConfig, pad: int) -> Iterator[None]:
    """Set the padding id to one that no row of the batch ends with, and switch the cache off, within this context.

    The model reads its score at the last token that is not `pad_token_id`. With a fixed id, such as EOS, a row that
    ends with that id would be read too early.
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
