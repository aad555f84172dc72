"""Configuration checks, run before the first step. Each raises a ValueError that names the value and what to do."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.data.sampler import ResumableLoader
from lit_rlhf.engines import Engine
from lit_rlhf.errors import InputError, InputTypeError
from lit_rlhf.evaluation.completions import check_completion_column
from lit_rlhf.evaluation.judges import SymmetricJudge
from lit_rlhf.evaluation.options import EvaluationOptions
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.rewards import RewardShaping, Scorer
from lit_rlhf.training.dynamic_sampling import DynamicSampling
from lit_rlhf.training.importance import Importance
from lit_rlhf.training.strategies import FSDP2Strategy
from lit_rlhf.training.updates import Updates
from lit_rlhf.types import Demonstrations, Preferences, Prompts, Record

DATA_MODULES: dict[type[Record], str] = {
    Prompts: "PromptData",
    Demonstrations: "DemonstrationData",
    Preferences: "PreferenceData",
}
"""The data module that yields each type of batch."""

OPTION_GROUPS: dict[str, type] = {
    "sampling": Sampling,
    "updates": Updates,
    "shaping": RewardShaping,
    "evaluation": EvaluationOptions,
    "engine": Engine,
    "importance": Importance,
    "dynamic_sampling": DynamicSampling,
}
"""Groups of options of algorithms that sample, by argument."""

KL_PENALTIES = {
    "k1_reward": None,
    "k2_loss": None,
    "k3_loss": "its gradient is that of KL(reference || policy), and with k1_reward that of KL(policy || reference)",
}
"""Estimators of the KL and where they enter, with the reason why the gradient is not that of the KL, if it is not."""


def parse_kl_penalty(kl_penalty: str, published: str, kl_coef: float) -> tuple[str, str]:
    """Return estimator and place of the KL penalty; warn if its gradient is not that of the KL, or it has no effect.

    Args:
        kl_penalty: `k1_reward`, `k2_loss` or `k3_loss`.
        published: What the method's paper uses, which gives no warning.
        kl_coef: The coefficient; at 0 there is no penalty.

    Raises:
        ValueError: If there is no such penalty.
    """
    if kl_penalty not in KL_PENALTIES:
        raise InputError(f"kl_penalty={kl_penalty!r} must be one of {', '.join(KL_PENALTIES)}")
    if kl_penalty != published and kl_coef == 0:
        rank_zero_warn(f"kl_penalty={kl_penalty!r} has no effect with kl_coef=0: raise kl_coef, or leave it out")
    elif kl_penalty != published and (reason := KL_PENALTIES[kl_penalty]):
        rank_zero_warn(f"kl_penalty={kl_penalty!r}: {reason}")
    estimator, _, place = kl_penalty.partition("_")
    return estimator, place


def check_batch_type(algorithm: str, wanted: type[Record] | None, data: Any) -> None:
    """Check that the data module yields what the algorithm learns from."""
    given = getattr(data, "batch_type", None)
    if wanted is None or given is None or given is wanted:
        return
    if given in DATA_MODULES or not issubclass(given, wanted):
        raise InputError(
            f"{algorithm} learns from {wanted.__name__} and {type(data).__name__} yields {given.__name__}: give "
            f"--data {DATA_MODULES[wanted]}"
        )


def check_processes(strategy: Strategy, world_size: int, devices: int, nodes: int) -> None:
    """Check that the processes train one model together.

    Raises:
        ValueError: If the strategy is neither a single device nor DDP nor FSDP2, if it forks or spawns, or if a
            launcher such as torchrun started another number of processes than the Trainer knows: each would run alone,
            in one folder.
    """
    others = DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy) or isinstance(strategy, others):
        raise InputError(
            f"the strategy {type(strategy).__name__} is not supported: use --trainer.strategy fsdp2 to shard models "
            "over several devices, ddp to have them whole on each, or auto"
        )
    if (method := getattr(strategy, "_start_method", "popen")) != "popen":
        raise InputError(
            f"processes that are started by {method} (ddp_spawn, ddp_fork, ddp_notebook) are not supported, since what "
            "they trained does not come back: use --trainer.strategy ddp, from a script"
        )
    launched = int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else world_size
    if not world_size == launched == devices * nodes:
        raise InputError(
            f"a launcher such as torchrun started {launched} processes, and the Trainer has devices={devices} x "
            f"num_nodes={nodes}: set --trainer.strategy ddp with as many devices and nodes as processes, or start one "
            "process without the launcher"
        )


def check_positions(config: Any, role: str, longest: int, max_new_tokens: int) -> None:
    """Check that prompt and completion together fit the positions of a model.

    Args:
        config: The model's configuration.
        role: Name of the model in messages.
        longest: Tokens of the longest row of the data.
        max_new_tokens: Tokens that are sampled after a prompt; 0 if the rows contain the completions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None or longest + max_new_tokens <= positions:
        return
    if max_new_tokens == 0:
        raise InputError(
            f"a row of {longest} tokens exceeds the {positions} positions of the {role}: drop longer ones with "
            "data.max_prompt_tokens and data.max_completion_tokens"
        )
    raise InputError(
        f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the {positions} positions of the "
        f"{role}: lower one of them, the prompts by data.max_prompt_tokens={max(1, positions - max_new_tokens)}"
    )


def check_columns(
    scorer: Scorer,
    judge: Scorer | SymmetricJudge,
    options: EvaluationOptions,
    train: Iterable[str] | None,
    val: Iterable[str] | None,
) -> None:
    """Check that the data have every column that the rewards, the judge and the evaluation read.

    Args:
        scorer: The rewards.
        judge: The judge.
        options: Options of the evaluation.
        train: Columns of the training data; None without any.
        val: Columns of the held-out data; None without any.
    """
    for columns in (train, val):
        if columns is not None:
            scorer.check(columns)
    if val is None:
        return
    judge.check(val)
    if options.compare_to != "policy":
        alternative = ", or `policy` for the reference policy's completions"
        check_completion_column("evaluation.compare_to", options.compare_to, val, alternative)
    if options.preferred is not None:
        check_completion_column("evaluation.preferred", options.preferred, val)


def check_groups(groups: Mapping[str, Any], others: Iterable[str]) -> None:
    """Check the type of grouped options, and that no option of a group was given outside it.

    Args:
        groups: Each group, by the argument's name.
        others: Names of the other arguments.

    Raises:
        TypeError: If one is wrong.
    """
    for name, value in groups.items():
        kind = f"lit_rlhf.{OPTION_GROUPS[name].__name__}"
        if not isinstance(value, OPTION_GROUPS[name]):
            raise InputTypeError(f"{name}={value!r} must be a {kind}, such as {kind}()")
        for field in dataclasses.fields(OPTION_GROUPS[name]):
            if field.name in others:
                raise InputTypeError(f"{field.name} is an option of {name}: give {name}={kind}({field.name}=...)")


def check_samples(algorithm: str, num_samples: int, least: int, updates: Updates) -> None:
    """Check how many completions of a prompt are sampled."""
    if num_samples < 1:
        raise InputError(f"num_samples={num_samples} must be at least 1")
    if num_samples < least:
        raise InputError(
            f"{algorithm} compares completions of one prompt, so num_samples={num_samples} must be at least {least}; "
            "Reinforce learns from one"
        )
    if updates.sample_minibatches > num_samples:
        raise InputError(f"sample_minibatches={updates.sample_minibatches} is more than num_samples={num_samples}")


def check_kl_coef(kl_coef: float) -> None:
    """Check the KL coefficient."""
    if not 0 <= kl_coef < math.inf:
        raise InputError(f"kl_coef={kl_coef} must be a number of 0 or more: the KL is subtracted from the reward")


def check_num_minibatches(num_minibatches: int, batch_size: int) -> None:
    """Check that a rollout has at least one prompt per minibatch."""
    if num_minibatches > batch_size:
        raise InputError(
            f"num_minibatches={num_minibatches} is more than the {batch_size} prompts of a rollout: lower it, raise "
            "data.batch_size, or split groups with sample_minibatches"
        )


def check_loader(trainer: Trainer, steps_per_rollout: int) -> None:
    """Check that the training loader belongs to this run, and repeats its prompts for every step of a rollout."""
    loader = trainer.train_dataloader
    if isinstance(loader, ResumableLoader) and loader.trainer is not trainer:
        raise InputError(
            "the training loader was made outside the run, so it does not know the ranks and the step to resume from: "
            "give the data module itself, trainer.fit(algorithm, datamodule=data)"
        )
    if steps_per_rollout > 1 and not isinstance(loader, ResumableLoader):
        raise InputError(
            f"a rollout lasts {steps_per_rollout} training steps, for which the loader must repeat its prompts: give "
            "the data as a lit_rlhf.PromptData instead of a loader, or set num_minibatches and update_epochs to 1"
        )


def check_updates(updates: Updates, accumulate: int, batch_size: int | None, callbacks: Iterable[Any]) -> None:
    """Check that minibatches and gradient accumulation fit together."""
    minibatches = updates.minibatches_per_epoch
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise InputError(
            "GradientAccumulationScheduler changes the length of an update, which the minibatches of a rollout depend "
            "on: set accumulate_grad_batches, and let the batch grow by lit_rlhf.callbacks.BatchSchedule"
        )
    if minibatches % accumulate and (accumulate % minibatches or updates.update_epochs > 1):
        raise InputError(
            f"accumulate_grad_batches={accumulate} does not fit a rollout of {minibatches} minibatches "
            f"(num_minibatches x sample_minibatches): give a divisor of {minibatches}, or with update_epochs=1 a "
            "multiple of it"
        )
    if batch_size is not None:
        check_num_minibatches(updates.num_minibatches, batch_size)


def check_on_policy(updates: Updates, accumulate: int, importance_ratio: bool) -> None:
    """Warn from three updates per rollout without a correction: most of them are off-policy."""
    count = updates.steps_per_rollout // accumulate
    if count > 2 and not importance_ratio:
        more = " and set update_epochs to 1" * (updates.update_epochs > 1)
        rank_zero_warn(
            f"{count} updates per rollout: all but the first are off-policy, which is not corrected; raise "
            f"accumulate_grad_batches to {updates.minibatches_per_epoch}{more} to be exactly on-policy"
        )


def check_sampling(sampling: Sampling) -> None:
    """Refuse greedy sampling in training; warn if truncated sampling biases the gradient."""
    if sampling.greedy:
        raise InputError("sampling.greedy is for `predict`: training on greedy completions explores nothing")
    if sampling.truncates:
        rank_zero_warn(
            "top_p, top_k and min_new_tokens bias the gradient, the more the further train/sampled_mass is below 1: "
            "train without them if you can"
        )
