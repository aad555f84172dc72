"""Runs of the paper configurations, step by step, with tiny local models and data."""

import csv
import json

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForSequenceClassification

from lit_rlhf.cli import main
from lit_rlhf.cli.config_files import CONFIGS
from tiny import make_llama, make_tokenizer

ONE_PROCESS = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true"]
SHORT = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--data.val=4"]

SETTINGS = {
    "tldr": {"demonstrations": "tldr.jsonl", "pairs": "tldr_pairs.jsonl", "prompts": "tldr.jsonl"},
    "hh": {"demonstrations": "hh.jsonl", "pairs": "hh.jsonl", "prompts": "hh.jsonl"},
}
ONLINE = {
    "RLOO": [],
    "RAFT": ["--model", "RAFT"],
    "Reinforce": ["--model", "Reinforce", "--model.num_samples", "1"],
    "VanillaPG": ["--model", "VanillaPG", "--model.num_samples", "1"],
    "PPO": ["--model", "PPO", "--model.num_samples", "1"],
}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer), max_position_embeddings=1024).save_pretrained("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_labels=1, pad_token_id=0, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained("judge")
    for folder in ("tiny", "judge"):
        tokenizer.save_pretrained(folder)
    posts = [f"POST: I met number {i}.\n\nTL;DR:" for i in range(40)]
    dialogues = [f"\n\nHuman: Hi {i}\n\nAssistant: Yes?\n\nHuman: Who is {i}?\n\nAssistant:" for i in range(40)]
    write("tldr.jsonl", [{"prompt": post, "completion": f" Met {i}."} for i, post in enumerate(posts)])
    pairs = [{"prompt": post, "chosen": f" Met {i}.", "rejected": " No."} for i, post in enumerate(posts)]
    write("tldr_pairs.jsonl", pairs)
    write("hh.jsonl", [{"chosen": f"{d} A man.", "rejected": f"{d} No idea."} for d in dialogues])
    return tmp_path


def write(name, rows):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def run(config, rows, *args):
    local = ["--model.policy=tiny", f"--data.train={rows}", "--trainer.default_root_dir=here"]
    main(["fit", "--config", config, *args, *local, *SHORT, *ONE_PROCESS])
    with open("here/version_0/metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("setting", "step"),
    [
        ("hh", "sft"),
        ("tldr", "reward_model"),
        ("hh", "dpo"),
        pytest.param("tldr", "sft", marks=pytest.mark.slow),
        pytest.param("hh", "reward_model", marks=pytest.mark.slow),
        pytest.param("tldr", "dpo", marks=pytest.mark.slow),
    ],
)
def test_offline_step_runs_and_exports_a_policy(setting, step, workspace):
    rows = SETTINGS[setting]["demonstrations" if step == "sft" else "pairs"]
    run(f"paper/{setting}_{step}", rows, "--data.batch_size=4", "--trainer.accumulate_grad_batches=1")
    assert (workspace / "here" / "policy" / "last" / "model.safetensors").is_file()


REWARDS = "[{class_path: lit_rlhf.RewardModel, init_args: {model: judge}}]"


def check_online(setting, *args):
    small = ["--data.batch_size=16", "--model.sampling.max_new_tokens=4", "--model.rewards", REWARDS]
    rows = run(f"paper/{setting}", SETTINGS[setting]["prompts"], *args, *small)
    updates = [row for row in rows if row["train/loss"]]
    assert len(updates) == 2
    assert any(row["val/win_rate"] and row["val/perplexity"] for row in rows)


def test_rloo_runs(workspace):
    check_online("tldr")


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ONLINE)
def test_online_algorithm_runs(setting, name, workspace):
    check_online(setting, *ONLINE[name])


def test_llama_configuration_overrides_hh(workspace):
    check_online("hh", "--config", "paper/llama")
    config = yaml.safe_load((workspace / "here" / "version_0" / "config.yaml").read_text())
    model, trainer = config["model"]["init_args"], config["trainer"]
    assert model["updates"]["num_minibatches"] == trainer["accumulate_grad_batches"] == 16
    assert model["kl_coef"] == 0.1 and trainer["max_epochs"] == 2


@pytest.mark.parametrize(
    ("name", "completions", "updates"), [("tldr", 512, 2), ("hh", 512, 2), ("llama", 2048, 1)]
)  # Back to Basics, appendix C
def test_commands_have_the_batch_sizes_of_the_paper(name, completions, updates):
    """Check the commands in the header of a configuration: options of its files, with overrides."""
    lines = (CONFIGS / "paper" / f"{name}.yaml").read_text().splitlines()
    commands = [
        line.partition("lit-rlhf fit ")[2].partition("  #")[0].split() for line in lines if "  lit-rlhf" in line
    ]
    algorithms = []
    for words in commands:
        pairs = list(zip(words[::2], words[1::2], strict=True))
        options = {}
        for flag, value in pairs:
            options |= flat(CONFIGS / f"{value}.yaml") if flag == "--config" else {flag[2:]: value}
        if pairs[0][1] not in ("paper/tldr", "paper/hh"):
            continue  # an offline step
        batch_size, samples, devices, minibatches, accumulate, prompt, new = (
            int(options[key])
            for key in (
                "data.batch_size", "model.num_samples", "trainer.devices", "model.updates.num_minibatches",
                "trainer.accumulate_grad_batches", "data.max_prompt_tokens", "model.sampling.max_new_tokens",
            )
        )  # fmt: skip
        assert batch_size * samples * devices == completions
        assert minibatches // accumulate == updates  # per rollout
        assert prompt + new == 512
        algorithms.append((options["model"], samples))
    assert algorithms == [("RLOO", 4), ("RAFT", 4), ("RLOO", 2), ("Reinforce", 1), ("VanillaPG", 1), ("PPO", 1)]


CONTEXT = {"tldr": {"data.max_prompt_tokens": 448}, "hh": {"data.max_prompt_tokens": 348}}
HYPERPARAMETERS = {
    "sft": {"model.optimizer.lr": 2e-5, "trainer.max_epochs": 2, "model.lr_scheduler.decay": "cosine"},
    "reward_model": {"model.optimizer.lr": 1e-5, "trainer.max_epochs": 1, "model.lr_scheduler.decay": "cosine"},
    "dpo": {"model.optimizer.lr": 1e-6},
    "tldr": {"model.optimizer.lr": 1e-6, "trainer.max_steps": 600, "model.kl_coef": 0.03},
    "hh": {"model.optimizer.lr": 1e-6, "trainer.max_steps": 393, "model.kl_coef": 0.10},
}  # Back to Basics, appendix C


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("step", ["sft", "reward_model", "dpo", None])
def test_hyperparameters_match_the_paper(setting, step):
    options = flat(CONFIGS / "paper" / f"{setting}_{step}.yaml" if step else CONFIGS / "paper" / f"{setting}.yaml")
    expected = HYPERPARAMETERS[step or setting] | CONTEXT[setting] | {"model.lr_scheduler.warmup": 0.03}
    assert {name: options.get(name) for name in expected} == expected
    if step:
        assert options["data.max_prompt_tokens"] + options["data.max_completion_tokens"] == 512
        assert step == "sft" or options["model.policy"] == f"runs/paper/{setting}/sft/policy/last"
    else:
        assert "model.lr_scheduler.decay" not in options  # constant


def flat(path):
    """Return the options of a configuration by the flag that overrides each."""
    options = {}

    def add(flag, value):
        if not isinstance(value, dict):
            options[flag] = value
            return
        if "class_path" in value:
            options[flag] = value["class_path"]
        for name, nested in value.get("init_args", value).items():
            add(f"{flag}.{name}", nested)

    for part, values in yaml.safe_load(path.read_text()).items():
        add(part, values)
    return options
