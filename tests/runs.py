"""Modules, data and Trainers for reproducible runs of every algorithm on a tiny model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

import lit_rlhf
from lit_rlhf import algorithms

METHODS = [n for n in algorithms.__all__ if not getattr(getattr(algorithms, n), "__abstractmethods__", None)]
VARIANTS = (
    "IPO", "DrGRPO", "DAPO", "GSPO", "CISPO", "ReinforcePlusPlus", "ReinforcePlusPlusBaseline", "OPO",
    "ReinforceBatchMean",
)  # fmt: skip
"""Methods that override an equation of another one, and nothing of the loop."""
SLOW_VARIANTS = [pytest.param(n, marks=pytest.mark.slow if n in VARIANTS else ()) for n in METHODS]
"""All methods, of which the variants are for the slow tests."""
ONLINE = [n for n in METHODS if issubclass(getattr(algorithms, n), lit_rlhf.OnlineAlgorithm)]


def vowels(completions, **kwargs):
    return [sum(c in "aeiou" for c in text) / 4 for text in completions]


GROUPS = {
    "sampling": lit_rlhf.Sampling,
    "updates": lit_rlhf.Updates,
    "shaping": lit_rlhf.RewardShaping,
    "evaluation": lit_rlhf.EvaluationOptions,
    "engine": lit_rlhf.Engine,
    "importance": lit_rlhf.Importance,
    "dynamic_sampling": lit_rlhf.DynamicSampling,
}


def grouped(options: dict) -> dict:
    """Move options such as `num_minibatches=2` into their dataclasses."""
    options, groups = dict(options), {}
    for group, kind in GROUPS.items():
        names = [field.name for field in dataclasses.fields(kind)]
        if found := {name: options.pop(name) for name in names if name in options}:
            groups[group] = dataclasses.replace(options.pop(group, kind()), **found)
    return {**options, **groups}


def make_module(name: str, folder: Path, lr: float = 1e-2, **options) -> lit_rlhf.Algorithm:
    if name in ONLINE:
        defaults = dict(rewards=[vowels], num_samples=3, max_new_tokens=6, kl_coef=0.05)
        options = grouped({**defaults, **options})
    options.setdefault("optimizer", lambda params: torch.optim.AdamW(params, lr=lr))
    return getattr(algorithms, name)(str(folder), **options)


def make_data(name: str, rows: int = 12, **options):
    texts = [f"{word} {i}" for i in range(rows // 4) for word in ("film", "book", "play", "song")]
    options = {"batch_size": 4, "val": 3, "split": "last", **options}
    if name in ONLINE:
        return lit_rlhf.PromptData(train=[{"prompt": t} for t in [*texts, "one", "two", "six"]], **options)
    texts = [*texts, "a", "b", "c"]
    pairs = [{"prompt": t, "chosen": f"good {i}", "rejected": f"bad {-i}"} for i, t in enumerate(texts)]
    if name in ("RewardModeling", "DPO", "IPO"):
        return lit_rlhf.PreferenceData(train=pairs, **options)
    demonstrations = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    if name == "KTO":
        demonstrations = [{**row, "label": i % 3 > 0} for i, row in enumerate(demonstrations)]
    return lit_rlhf.DemonstrationData(train=demonstrations, **options)


def make_trainer(root: Path, **options) -> Trainer:
    defaults = dict(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    return Trainer(**{**defaults, **options})


def training_state(trainer) -> dict:
    """Return weights, optimizer state, learning rates and the number of updates."""
    optimizer = trainer.optimizers[0].state_dict()["state"]
    moments = {f"{i}.{name}": torch.as_tensor(v) for i, state in optimizer.items() for name, v in state.items()}
    schedule = [torch.tensor(c.scheduler.get_last_lr()) for c in trainer.lr_scheduler_configs]
    weights = {n: v.clone() for n, v in trainer.lightning_module.state_dict().items()}
    rates = torch.cat(schedule) if schedule else torch.empty(0)
    return {**weights, **moments, "steps": torch.tensor(trainer.global_step), "lr": rates}


def differing_tensors(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
