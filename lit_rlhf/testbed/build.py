"""Make the two shipped models from nothing but the code and a seed: `python -m lit_rlhf.testbed.build --out FOLDER`.

Demonstrations, SFT, pairs sampled from the policy, raters, a reward model, RLOO, more pairs, a better reward model: the
pipeline that a user runs on data of their own, by the same classes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_rlhf.algorithms import RLOO, SFT, RewardModeling
from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.callbacks import RLHFProgressBar
from lit_rlhf.data import DemonstrationData, PreferenceData, PromptData
from lit_rlhf.models.policy import Policy
from lit_rlhf.rewards import RewardModel
from lit_rlhf.testbed.pairs import sampled_pairs
from lit_rlhf.testbed.raters import Raters
from lit_rlhf.testbed.tokenizer import make_tokenizer
from lit_rlhf.testbed.utility import gold
from lit_rlhf.testbed.world import demonstrations, prompts
from lit_rlhf.training.schedules import Warmup


def new_policy(tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 4) -> Policy:
    """Return an untrained Llama; with the tokenizer of the testbed it has 0.9 million parameters."""
    heads = max(1, hidden // 32)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Policy(LlamaForCausalLM(config), tokenizer)


def fit(method: Algorithm, data: LightningDataModule, epochs: int, max_steps: int = -1) -> None:
    """Train on the CPU; nothing is written."""
    quiet: dict[str, Any] = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    limits: dict[str, Any] = dict(max_epochs=epochs, max_steps=max_steps, gradient_clip_val=1.0)
    bar = RLHFProgressBar(seconds=30)
    Trainer(accelerator="cpu", devices=1, callbacks=[bar], **limits, **quiet).fit(method, datamodule=data)


def options(lr: float) -> dict[str, Any]:
    """Return an optimizer and its schedule for training tiny models from the start."""
    return dict(
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
        lr_scheduler=lambda optimizer: Warmup(optimizer, 0.05, "cosine"),
    )


def accuracy(reward_model: RewardModel, pairs: list[dict[str, str]]) -> tuple[float, float]:
    """Return how often the reward model agrees with the raters, and how often with gold (where gold decides)."""
    asked, chosen, rejected = ([row[key] for row in pairs] for key in ("prompt", "chosen", "rejected"))
    margin = reward_model([*asked], [*chosen]) - reward_model([*asked], [*rejected])
    worth = [torch.tensor(gold(prompts=asked, completions=texts)) for texts in (chosen, rejected)]
    truth = worth[0] - worth[1]
    decided = truth != 0
    right = (margin.sign() == truth.sign())[decided]
    return float((margin > 0).float().mean()), float(right.float().mean())


def shrink(folder: Path) -> None:
    """Store a model's weights in half precision; its config still says float32, which is what they are loaded to."""
    path = folder / "model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})


def train_reward_model(policy: Path, pairs: list[dict[str, str]], out: Path, seed: int) -> None:
    """Learn a reward model from pairs and write it to a folder, small."""
    seed_everything(seed)
    method = RewardModeling(str(policy), **options(4e-4))
    fit(method, PreferenceData(pairs, batch_size=32), epochs=1)
    method.save_model(out)
    shrink(out)


def explore(policy: Path, reward_model: Path, rows: list[dict[str, str]], updates: int, seed: int) -> Policy:
    """Return what RLOO makes of the policy, mistakes of the reward model included."""
    seed_everything(seed)
    method = RLOO(
        str(policy),
        rewards=[RewardModel(reward_model, batch_size=128)],
        max_new_tokens=32,
        kl_coef=0.1,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
        lr_scheduler=lambda optimizer: Warmup(optimizer, 5),
    )
    fit(method, PromptData(rows, batch_size=min(32, len(rows))), epochs=-1, max_steps=updates)
    return method.policy


def build(
    out: Path = Path("runs/testbed"),
    seed: int = 0,
    num_demonstrations: int = 40_000,
    num_prompts: int = 1016,
    rounds: int = 8,
    updates: int = 80,
) -> None:
    """Write `out/policy` and `out/reward_model`, and print how right the reward model is on held-out prompts.

    Raters first compare what the policy writes. A reward model that has seen nothing else is soon exploited, so RLOO
    does that twice, and raters go on with what the policies write that it leads to.

    Args:
        out: The folder.
        seed: Of everything.
        num_demonstrations: Reviews that SFT reads, once.
        num_prompts: Training prompts that the policies are sampled on.
        rounds: Times that raters go through these prompts before RLOO, two pairs each; three quarters of it after.
        updates: Of RLOO.
    """
    seed_everything(seed)
    sft = SFT(new_policy(make_tokenizer()), **options(2e-3))
    fit(sft, DemonstrationData(demonstrations(num_demonstrations, seed), batch_size=32), epochs=1)
    sft.policy.save(out / "policy")
    shrink(out / "policy")

    rows, raters = prompts(num_prompts, seed), Raters()
    policies = [Policy.from_pretrained(out / "policy")]
    pairs = raters.preferences(sampled_pairs(policies, rows, rounds, seed), seed)
    with tempfile.TemporaryDirectory() as first:
        train_reward_model(out / "policy", pairs, Path(first), seed)
        policies += [explore(out / "policy", Path(first), rows, updates, seed + i) for i in (1, 2)]
    pairs += raters.preferences(sampled_pairs(policies, rows, max(1, rounds * 3 // 4), seed + 1), seed + 1)
    train_reward_model(out / "policy", pairs, out / "reward_model", seed)

    reward_model = RewardModel(out / "reward_model", batch_size=256)
    unseen = prompts(min(253, num_prompts), seed, held_out=True)
    print(f"{len(pairs)} pairs; on held-out prompts the reward model agrees")
    for name, writers in {"the SFT policy": policies[:1], "all policies": policies}.items():
        held_out = raters.preferences(sampled_pairs(writers, unseen, 4, seed + 2), seed + 2)
        noisy, true = accuracy(reward_model, held_out)
        print(f"with the raters in {noisy:.1%} of {len(held_out)} pairs by {name}, with gold in {true:.1%}")


if __name__ == "__main__":
    jsonargparse.auto_cli(build, as_positional=False, prog="python -m lit_rlhf.testbed.build")
