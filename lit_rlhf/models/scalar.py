"""What return to expect: a learned value for the state before each token of a completion."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lit_rlhf import functional as F
from lit_rlhf.models.attention import use_cpu_attention
from lit_rlhf.models.loading import add_lora, disable_dropout, embedding_rows, hub_options, is_adapter, resolve
from lit_rlhf.models.shared_prompt import (
    Given,
    as_sampled,
    checkpoints_activations,
    completion_features,
    eval_mode,
    hidden_states,
    why_not_shared,
)
from lit_rlhf.types import Prompts


class Critic(nn.Module):
    """A value model: a sequence-classification model of one label, read before every token instead of at the end.

    The value of the first completion token comes from the last prompt position. Each prompt is computed once for all
    its completions, as in `Policy`.

    Args:
        model: A `transformers` sequence-classification model with one label and a decoder-only trunk, such as a reward
            model, or a PEFT model around one. Its dropout is switched off.

    Raises:
        ValueError: If the model has no such head.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model
        if not hasattr(self._classifier, "score") or self._classifier.config.num_labels != 1:
            name = type(self._classifier).__name__
            raise ValueError(f"a {name} is no critic: give a decoder-only model, with one label if it has labels")
        disable_dropout(model)
        use_cpu_attention(model)
        self.train()  # Lightning warns of what trains in evaluation mode
        self.shares_prompt: bool | None = None

    @classmethod
    def from_pretrained(cls, source: str | Path, lora: dict[str, Any] | None = None, **options: Any) -> Critic:
        """Load a critic from a hub id or a folder: a reward model with its head, or a policy, valuing all at 0.

        Args:
            source: The hub id or folder; `testbed` for the shipped policy.
            lora: Options of `peft.LoraConfig` to train an adapter and the head instead of all weights.
            **options: Handed to `from_pretrained` of `transformers`. Weights are float32 unless `dtype` says otherwise.

        Raises:
            ValueError: If it is an adapter, or has more than one label.
        """
        name = resolve(source)
        if is_adapter(name):
            raise ValueError(
                f"the critic {name!r} is an adapter, and a critic starts from a whole model: merge it first, with "
                "lit-rlhf export --ckpt_path last.ckpt --out FOLDER --merge true, or use critic='head'"
            )
        config = AutoConfig.from_pretrained(name, **hub_options(options))
        labelled = any("SequenceClassification" in architecture for architecture in config.architectures or ())
        if labelled and config.num_labels != 1:
            raise ValueError(f"the critic {name!r} has {config.num_labels} labels, and a value is one number")
        options = {"dtype": torch.float32, **options, "num_labels": 1, "output_loading_info": True}
        model, told = AutoModelForSequenceClassification.from_pretrained(name, **options)
        if any("score" in name for name in told["missing_keys"]):
            nn.init.zeros_(model.score.weight)
        critic = cls(model if lora is None else add_lora(model, {**lora, "task_type": "SEQ_CLS"}))
        if lora is not None:  # the head is trained: bfloat16, in which the frozen trunk may be, is too coarse for it
            critic._classifier.score.float()
        return critic

    @property
    def _classifier(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self._classifier.config

    def check_vocabulary(self, policy: Any) -> None:
        """Check that the critic knows every token id that a causal language model can write.

        Raises:
            ValueError: If it embeds fewer.
        """
        known, written = embedding_rows(self._classifier), embedding_rows(policy)
        if known < written:
            raise ValueError(
                f"the critic embeds {known} token ids and the policy {written}: give a critic with the same tokenizer, "
                "such as one that started from the same model"
            )

    def values(self, prompts: Prompts, completions: Given) -> Float[Tensor, "prompts samples tokens"]:
        """The return expected before each token, at least float32, 0 where masked. Differentiable."""
        self.probe()
        model = self._classifier
        forward = functools.partial(hidden_states, model.base_model)
        shared = bool(self.shares_prompt) and not checkpoints_activations(self.model)
        with as_sampled(self.model):
            features = completion_features(forward, model.config, prompts, completions, shared)
        return value_head(model.score, features, completions)

    @torch.no_grad()
    def probe(self) -> None:
        """Find out, once, whether this model allows a shared prompt; say so where it does not."""
        if self.shares_prompt is not None:
            return
        model = self._classifier
        forward = functools.partial(hidden_states, model.base_model)
        with eval_mode(self.model):
            reason = why_not_shared(forward, model.config, embedding_rows(model), next(self.parameters()).device)
        self.shares_prompt = reason is None
        if reason is not None:
            rank_zero_info(f"the critic computes each prompt once a completion: {reason}")


def value_head(
    head: nn.Module, features: Float[Tensor, "prompts samples tokens features"], completions: Given
) -> Float[Tensor, "prompts samples tokens"]:
    """Turn features into values, 0 where masked; under autocast too in the precision of the head."""
    with torch.autocast(features.device.type, enabled=False):
        values: Tensor = head(features.to(next(head.parameters()).dtype)).squeeze(-1)
    return F.at_least_float32(values).masked_fill(~completions.mask, 0.0)
