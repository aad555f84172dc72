"""Build the models of a run from their configurations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig, PeftModelForCausalLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from lit_rlhf.algorithms import Algorithm, RewardModeling
from lit_rlhf.memory.rehearsal import Rehearsal, without_storage
from lit_rlhf.models.forward import ModelForward
from lit_rlhf.models.loading import check_causal_lm
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.pretrained import config_only, download_options, is_adapter, load_model, resolve, shared_options
from lit_rlhf.models.reference import Reference
from lit_rlhf.models.scalar import Critic, ScalarModel
from lit_rlhf.rewards import RewardModel


class Scorer(NamedTuple):
    """A reward model, the number of completions that it scores at a time, and whether it is offloaded between uses."""

    model: ScalarModel
    rows: int
    offloaded: bool


@dataclass
class Models:
    """The models of a run, without storage.

    Attributes:
        fake: The mode that their weights are fake tensors of.
        trained: The policy, or the reward model that is trained.
        critic: The critic, if it is a model.
        head: A value head on the policy's trunk.
        reference: The copy of the policy that the reference is; None with an adapter, which is switched off.
        rewards: Reward models.
    """

    fake: FakeTensorMode
    trained: Policy | ScalarModel
    critic: Critic | None
    head: nn.Linear | None
    reference: Policy | None
    rewards: list[Scorer]

    @property
    def weights(self) -> list[Tensor]:
        """Weights and buffers of all models."""
        modules = [self.trained, self.critic, self.head, self.reference, *(scorer.model for scorer in self.rewards)]
        return [t for module in modules if module is not None for t in (*module.parameters(), *module.buffers())]


@dataclass(frozen=True)
class Builder:
    """Builds the models of an algorithm that was made with its options.

    Attributes:
        algorithm: The algorithm, whose models are not loaded.
        dtype: What the precision casts all weights to; None: they stay as they are loaded.
    """

    algorithm: Algorithm
    dtype: torch.dtype | None = None

    def build(self) -> Models:
        """Build them, the algorithm's own included."""
        self.algorithm._tokenizer = blank_tokenizer()
        with config_only():
            if not isinstance(self.algorithm, RewardModeling):
                self.algorithm.policy = Policy(
                    build_causal_lm(self.algorithm.pretrained, self.algorithm.load_options),
                    self.algorithm._tokenizer,
                    self.algorithm.lora,
                )
            self.algorithm.configure_model()
            specs = getattr(getattr(self.algorithm, "scorer", None), "_specs", [])
            found = [spec.reward for spec in specs if isinstance(spec.reward, RewardModel)]
            rewards = [
                Scorer(
                    ScalarModel.from_pretrained(
                        str(r.pretrained), name="reward model", trained=False, **r.load_options
                    ),
                    r.batch_size,
                    r.offload,
                )
                for r in found
            ]
        reference = vars(self.algorithm).get("reference")
        copy = reference.copy if isinstance(reference, Reference) else None
        if self.dtype is not None:
            self.algorithm.to(self.dtype)
        if copy is not None:
            copy.to(self.dtype)
        critic: Any = self.algorithm._modules.get("critic")
        models = Models(
            fake=FakeTensorMode(allow_non_fake_inputs=True),
            trained=cast(Policy | ScalarModel, self.algorithm._modules.get("reward_model") or self.algorithm.policy),
            critic=critic if isinstance(critic, Critic) else None,
            head=critic if isinstance(critic, nn.Linear) else None,
            reference=copy,
            rewards=rewards,
        )
        others: list[nn.Module] = [scorer.model for scorer in rewards] + ([copy] if copy is not None else [])
        without_storage([self.algorithm, *others], models.fake)
        for model in [models.trained, *([critic] if models.critic else []), *others]:
            decide(model.model_forward, models)
        return models


def build_causal_lm(source: str, options: dict[str, Any]) -> Any:
    """Build the causal language model of a hub id or folder, or an adapter's base model with the adapter."""
    check_causal_lm(source, **options)
    name, what = resolve(source), f"the policy {source!r}"
    if not is_adapter(name, **options):
        return load_model(AutoModelForCausalLM, source, what, **options)[0]
    config = PeftConfig.from_pretrained(name, **download_options(options))
    base = str(config.base_model_name_or_path)
    model = load_model(AutoModelForCausalLM, base, f"{base!r}, the base model of {what},", **shared_options(options))[0]
    config.inference_mode, config.task_type = False, "CAUSAL_LM"
    return PeftModelForCausalLM(model, config)


def blank_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one added token: sizes need none, and a folder may have only a configuration."""
    words = Tokenizer(WordLevel({"<blank>": 0}, unk_token="<blank>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<blank>")  # type: ignore[no-untyped-call]


def decide(forward: ModelForward, models: Models) -> None:
    """Set what a probe would find out: whether the head can be applied apart, and a prompt be shared."""
    layers = DynamicCache(config=forward.config).layers
    forward.shares_prompt = not any(hasattr(layer, "recurrent_states") for layer in layers)
    if forward.head_name is not None:
        return
    outputs: list[Tensor] = []
    handle = forward.head.register_forward_hook(lambda _, __, output: outputs.append(output))
    with Rehearsal(models.fake, models.weights), torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.long)
        logits = forward.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    handle.remove()
    forward.head_apart = len(outputs) == 1 and logits.untyped_storage() is outputs[0].untyped_storage()
