"""Build the two shipped models from the code and a seed alone: `python -m lit_rlhf.testbed.build --out FOLDER`.

Demonstrations, SFT, pairs sampled from the policy, raters, a reward model, RLOO, more pairs, a better reward model: the
pipeline that users run on their own data, with the same classes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_rlhf.algorithms import RLOO, SFT, RewardModeling
from lit_rlhf.callbacks import RLHFProgressBar
from lit_rlhf.data import DemonstrationData, PreferenceData, PromptData
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.rewards import RewardModel
from lit_rlhf.testbed.pairs import sampled_pairs
from lit_rlhf.testbed.raters import Raters
from lit_rlhf.testbed.tokenizer import make_tokenizer
from lit_rlhf.testbed.utility import gold
from lit_rlhf.testbed.world import demonstrations, prompts
from lit_rlhf.training.schedules import Warmup


def new_policy(tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 4) -> Policy:
    """Return a Llama policy with random weights: 0.9 million parameters with the tokenizer of the testbed."""
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


def make_trainer(epochs: int, max_steps: int = -1) -> Trainer:
    """Return a Trainer for the CPU that writes no files."""
    quiet: dict[str, Any] = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    limits: dict[str, Any] = dict(max_epochs=epochs, max_steps=max_steps, gradient_clip_val=1.0)
    return Trainer(accelerator="cpu", devices=1, callbacks=[RLHFProgressBar(seconds=30)], **limits, **quiet)


def optimizer_options(lr: float) -> dict[str, Any]:
    """Return the optimizer and schedule arguments for training tiny models from scratch."""
    return dict(
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
        lr_scheduler=lambda optimizer: Warmup(optimizer, 0.05, "cosine"),
    )


def accuracy(reward_model: RewardModel, pairs: list[dict[str, str]]) -> tuple[float, float]:
    """Return the pairwise accuracy against the raters, and against gold, without the pairs that gold ties."""
    prompt_texts, chosen, rejected = ([row[key] for row in pairs] for key in ("prompt", "chosen", "rejected"))
    margin = reward_model([*prompt_texts], [*chosen]) - reward_model([*prompt_texts], [*rejected])
    utilities = [torch.tensor(gold(prompts=prompt_texts, completions=texts)) for texts in (chosen, rejected)]
    gold_margin = utilities[0] - utilities[1]
    correct = (margin.sign() == gold_margin.sign())[gold_margin != 0]
    return float((margin > 0).float().mean()), float(correct.float().mean())


def shrink(folder: Path) -> None:
    """Store a model's weights in half precision; its config keeps float32, the dtype that they are loaded in."""
    path = folder / "model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})


def train_reward_model(policy: Path, pairs: list[dict[str, str]], out: Path, seed: int) -> None:
    """Train a reward model on pairs and write it to a folder, in half precision."""
    seed_everything(seed)
    algorithm = RewardModeling(str(policy), **optimizer_options(4e-4))
    make_trainer(epochs=1).fit(algorithm, datamodule=PreferenceData(pairs, batch_size=32))
    algorithm.save_model(out)
    shrink(out)


def explore(policy: Path, reward_model: Path, rows: list[dict[str, str]], updates: int, seed: int) -> Policy:
    """Train the policy with RLOO on the reward model and return it, including any reward over-optimization."""
    seed_everything(seed)
    algorithm = RLOO(
        str(policy),
        rewards=[RewardModel(reward_model, batch_size=128)],
        sampling=Sampling(max_new_tokens=32),
        kl_coef=0.1,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
        lr_scheduler=lambda optimizer: Warmup(optimizer, 5),
    )
    data = PromptData(rows, batch_size=min(32, len(rows)))
    make_trainer(epochs=-1, max_steps=updates).fit(algorithm, datamodule=data)
    return algorithm.policy


def build(
    out: Path = Path("runs/testbed"),
    seed: int = 0,
    num_demonstrations: int = 40_000,
    num_prompts: int = 1016,
    rounds: int = 8,
    updates: int = 80,
) -> None:
    """Write `out/policy` and `out/reward_model`, and print the reward model's accuracy on held-out prompts.

    Raters first compare samples of the SFT policy. A reward model trained on these alone is soon exploited. So two
    RLOO runs, with two seeds, train on it, and the raters also compare samples of the resulting policies.

    Args:
        out: Output folder.
        seed: Seed of the whole pipeline.
        num_demonstrations: Number of reviews for SFT, one epoch.
        num_prompts: Number of training prompts to sample completions for.
        rounds: Passes over these prompts with the SFT policy, two pairs per prompt; after RLOO three quarters as many.
        updates: Number of RLOO updates.
    """
    seed_everything(seed)
    sft = SFT(new_policy(make_tokenizer()), **optimizer_options(2e-3))
    data = DemonstrationData(demonstrations(num_demonstrations, seed), batch_size=32)
    make_trainer(epochs=1).fit(sft, datamodule=data)
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
    test_prompts = prompts(min(253, num_prompts), seed, held_out=True)
    print(f"{len(pairs)} pairs; on held-out prompts the reward model agrees")
    for name, sampled_policies in {"the SFT policy": policies[:1], "all policies": policies}.items():
        held_out = raters.preferences(sampled_pairs(sampled_policies, test_prompts, 4, seed + 2), seed + 2)
        by_raters, by_gold = accuracy(reward_model, held_out)
        print(f"with the raters in {by_raters:.1%} of {len(held_out)} pairs by {name}, with gold in {by_gold:.1%}")


if __name__ == "__main__":
    jsonargparse.auto_cli(build, as_positional=False, prog="python -m lit_rlhf.testbed.build")
