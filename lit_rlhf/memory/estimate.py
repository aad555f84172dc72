"""What a run holds on each device: weights, gradients, optimizer state, and the peaks of its two phases."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lit_rlhf.algorithms import Algorithm
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.algorithms.vanilla_pg import VanillaPG
from lit_rlhf.memory.models import Builder, Models
from lit_rlhf.memory.passes import Passes, Shape
from lit_rlhf.memory.rehearsal import size
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.quantized import dequantized_bytes
from lit_rlhf.models.sharding import decoder_layers

CRITIC = "critic's weights", "optimizer state"
"""What is offloaded with a critic, by the names of an estimate."""
BACK = "offloaded before"
HALF = {"bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """How a run is placed on devices.

    Attributes:
        precision: Lightning's precision.
        accumulate: Training steps of an update.
        devices: Number of devices.
        strategy: `single`, `ddp` or `fsdp2`.
        gather: Whether fsdp2 gathers whole models for passes without gradient.
        on_cpu: Whether the devices are CPUs.
    """

    precision: str = "32-true"
    accumulate: int = 1
    devices: int = 1
    strategy: str = "single"
    gather: bool = True
    on_cpu: bool = True

    @property
    def half(self) -> torch.dtype | None:
        """The 16-bit dtype of the precision, if it has one."""
        return HALF.get(self.precision.partition("-")[0])

    @property
    def mixed(self) -> bool:
        """Whether only products are in 16 bits."""
        return self.precision.endswith("mixed")


@dataclass
class Estimate:
    """Bytes on each device.

    Attributes:
        always: What is held during the whole run, by name.
        sampling: What the sampling and scoring phase adds, by name; empty for methods that do not sample.
        update: What the update adds, by name.
    """

    always: dict[str, int] = field(default_factory=dict)
    sampling: dict[str, int] = field(default_factory=dict)
    update: dict[str, int] = field(default_factory=dict)

    @property
    def sampling_peak(self) -> int:
        """Most bytes while completions are sampled and scored."""
        return sum(self.always.values()) + sum(self.sampling.values()) if self.sampling else 0

    @property
    def update_peak(self) -> int:
        """Most bytes in an update."""
        return sum(self.always.values()) + sum(self.update.values())

    @property
    def peak(self) -> int:
        """Most bytes at any time."""
        return max(self.sampling_peak, self.update_peak)


@dataclass
class Calculator:
    """Calculates the memory of a run from the second update on, with prompts and completions of full length.

    Attributes:
        algorithm: The algorithm, made with its options; its models are not loaded, and its code is rehearsed.
        shape: Prompts of a step and device, completions of each, and their tokens.
        setting: How the run is placed on devices.
    """

    algorithm: Algorithm
    shape: Shape
    setting: Setting

    @functools.cached_property
    def passes(self) -> Passes:
        """The passes, with models that are built on first use."""
        mixed, half = self.setting.mixed, self.setting.half
        models = Builder(self.algorithm, None if mixed else half).build()
        return Passes(self.algorithm, models, half if mixed else None, self.setting.on_cpu)

    def estimate(self) -> Estimate:
        """Return what each device holds."""
        shards = self.setting.devices if self.setting.strategy == "fsdp2" else 1
        found = Estimate()
        found.always = {name: math.ceil(held / shards) for name, held in model_sizes(self.passes.models).items()}
        step = self.passes.optimizer_step(fused=shards == 1)
        found.always["optimizer state"] = math.ceil(step.kept / shards)
        away = self.offloaded(found.always)
        found.always = {
            name: held - away.get(name, 0) for name, held in found.always.items() if held > away.get(name, 0)
        }
        trained = trained_size(self.algorithm)
        if self.setting.strategy == "ddp":
            found.always["DDP's buckets of gradients"] = trained
        if isinstance(self.algorithm, OnlineAlgorithm):
            found.always["rollout"] = self.rollout_size()
            found.sampling = self.sampling_phase(away)
            if self.setting.accumulate > self.algorithm.steps_per_rollout:
                found.sampling["gradients so far"] = math.ceil(trained / shards)
        found.update = self.update_phase()
        at_the_step = math.ceil((trained + step.most - step.kept) / shards)
        if at_the_step > sum(found.update.values()):
            found.update = {"gradients, and the optimizer's step": at_the_step}
        found.update |= {f"{name} ({BACK})": away[name] for name in CRITIC if name in away}
        return found

    def offloaded(self, always: dict[str, int]) -> dict[str, int]:
        """Return what is in main memory between uses, by name."""
        models, algorithm = self.passes.models, self.algorithm
        if self.setting.on_cpu:
            return {}
        found = {"reward models": sum(held(scorer.model) for scorer in models.rewards if scorer.offloaded)}
        if getattr(algorithm, "offload_reference", False):
            found["reference"] = always.get("reference", 0)
        if getattr(algorithm, "offload_critic", False) and models.critic is not None:
            share = trained_size(models.critic) / trained_size(algorithm)
            found |= dict(zip(CRITIC, (held(models.critic), int(share * always["optimizer state"])), strict=True))
        return {name: bytes_ for name, bytes_ in found.items() if bytes_}

    def rollout_size(self) -> int:
        """Return the bytes of a rollout: ids, mask, and float32 numbers of each token."""
        assert isinstance(self.algorithm, OnlineAlgorithm)
        keeps_old = self.algorithm.uses_importance_ratio or self.algorithm.corrects_updates
        numbers = 3 + keeps_old + 3 * isinstance(self.algorithm, VanillaPG)
        return self.shape.prompts * self.shape.samples * self.shape.completion_tokens * (8 + 1 + 4 * numbers)

    def sampling_phase(self, away: dict[str, int]) -> dict[str, int]:
        """Return what the largest pass without gradient adds: of sampling, reference, critic, reward models.

        Args:
            away: What is offloaded, by name.
        """
        assert isinstance(self.algorithm, OnlineAlgorithm)
        sampling, updates, models = self.algorithm.sampling, self.algorithm.updates, self.passes.models
        shape = replace(self.shape, samples=self.shape.samples + self.algorithm.extra_samples)
        part = replace(shape, prompts=min(shape.prompts, sampling.batch_size or shape.prompts))
        drawn = self.passes.sampling(part, sampling)
        found = [{"copies of weights for decoding": drawn.kept, "KV cache and logits": drawn.most - drawn.kept}]
        found[0] |= gathering(models.trained, self.setting)
        found[0] |= dequantizing(models.trained)
        minibatch = replace(shape, prompts=math.ceil(shape.prompts / updates.num_minibatches))
        logprobs = functools.partial(self.algorithm.policy.logprobs, temperature=sampling.temperature)
        scores: list[tuple[str, nn.Module, Any, Shape, int]] = []
        if self.algorithm.reference_source is not None:
            reference, back = models.reference or models.trained, away.get("reference", 0)
            scores.append(("the reference's pass", reference, logprobs, minibatch, back))
        if models.critic is not None:
            smaller = replace(minibatch, samples=math.ceil(shape.samples / updates.sample_minibatches))
            back = sum(away.get(name, 0) for name in CRITIC)
            scores.append(("the critic's pass", models.critic, models.critic.values, smaller, back))
        for judge, rows, offloaded in models.rewards:
            batch = replace(shape, prompts=max(1, min(rows // shape.samples, shape.prompts)))
            back = held(judge) if offloaded and away else 0
            scores.append(("a reward model's pass", judge, judge.score, batch, back))
        judges = [scorer.model for scorer in models.rewards]
        for name, model, score, batch, back in scores:
            gathered = gathering(model, self.setting, as_saved=model in judges)
            returned = {f"its weights ({BACK})": back} if back else {}
            most = self.passes.scoring(batch, score).most
            found.append({name: most, **gathered, **returned, **dequantizing(model)})
        return max(found, key=lambda parts: sum(parts.values()))

    def update_phase(self) -> dict[str, int]:
        """Return what the largest training step of an update adds."""
        batch, trained = self.training_shape(), trained_size(self.algorithm)
        if self.setting.strategy != "fsdp2":
            peak = self.passes.training(batch, accumulated=self.setting.accumulate > 1)
            gradients = min(trained, peak.most)
            expanded = dequantizing(self.passes.models.trained)
            return {"activations": peak.most - gradients, "gradients": gradients, **expanded}
        without, with_gradients = (
            self.passes.training(batch, accumulated=False, gradients=counted).most for counted in (False, True)
        )
        models = [model for model in (self.passes.models.trained, self.passes.models.critic) if model is not None]
        whole = sum(in_step(model, self.setting) for model in models)
        share = trained / max(1, sum(held(model) for model in models))  # of what is gathered, with a gradient each
        accumulated = trained if self.setting.accumulate > 1 else with_gradients - without  # others as activations go
        return {
            "activations": without,
            "gradients": math.ceil(accumulated / self.setting.devices) + math.ceil(share * whole),
            "gathered weights": whole,
        }

    def training_shape(self) -> Shape:
        """Return the batch of a training step."""
        if not isinstance(self.algorithm, OnlineAlgorithm):
            return self.shape
        prompts = math.ceil(self.shape.prompts / self.algorithm.updates.num_minibatches)
        samples = math.ceil(self.shape.samples / self.algorithm.updates.sample_minibatches)
        return Shape(prompts, samples, self.shape.prompt_tokens, self.shape.completion_tokens)


def model_sizes(models: Models) -> dict[str, int]:
    """Return the bytes of the weights of each model."""
    trained = models.trained
    name = "policy" if isinstance(trained, Policy) else "reward model"
    own = {id(tensor) for tensor in (*trained.parameters(), *trained.buffers())}
    sizes = {f"{name}'s weights": held(trained)}
    if models.reference is not None:
        copied = [t for t in (*models.reference.parameters(), *models.reference.buffers()) if id(t) not in own]
        sizes["reference"] = size(copied)
    if (critic := models.critic or models.head) is not None:
        sizes["critic's weights"] = held(critic)
    if models.rewards:
        sizes["reward models"] = sum(held(scorer.model) for scorer in models.rewards)
    return sizes


def trained_size(module: nn.Module) -> int:
    """Return the bytes of a module's weights that are trained."""
    return size(p for p in module.parameters() if p.requires_grad)


def held(module: nn.Module) -> int:
    """Return the bytes of a module's weights and buffers, of which some may be quantized."""
    whole = size((*module.parameters(), *module.buffers()))
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "quantized_bytes")]
    return whole - size(layer.weight for layer in layers) + sum(int(layer.quantized_bytes) for layer in layers)


def dequantizing(model: nn.Module) -> dict[str, int]:
    """Return what a pass of a model with quantized weights adds: one layer at a time is expanded."""
    largest = dequantized_bytes(model)
    return {"a dequantized layer": largest} if largest else {}


def gathering(model: nn.Module, setting: Setting, as_saved: bool = False) -> dict[str, int]:
    """Return what fsdp2 gathers of a model for a pass without gradient.

    Args:
        model: The model.
        setting: How the run is placed on devices.
        as_saved: Whether its layers keep their dtype, as those of reward models do, whatever the precision.
    """
    if setting.strategy != "fsdp2":
        return {}
    if not setting.gather:
        return {"gathered weights": in_step(model, setting, as_saved)}
    layers = sum(held(layer) for layer in decoder_layers(model))
    return {"gathered weights": held(model) - layers + layers * width(setting, as_saved) // 4}


def in_step(model: nn.Module, setting: Setting, as_saved: bool = False) -> int:
    """Return the bytes of what is gathered layer by layer: two layers, one of them ahead, and the rest of the model."""
    layers = [held(layer) for layer in decoder_layers(model)]
    return held(model) - sum(layers) + 2 * max(layers, default=0) * width(setting, as_saved) // 4


def width(setting: Setting, as_saved: bool) -> int:
    """Return to how many bytes fsdp2 gathers four bytes of a layer."""
    return 2 if setting.mixed and setting.half is not None and not as_saved else 4
