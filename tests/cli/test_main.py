"""What users type, run as they would type it, with tiny stand-ins for models and data."""

import csv
import json
import math
import signal
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lit_rlhf
from commands import FAST, SHORT, fit
from lit_rlhf.cli import main
from lit_rlhf.cli.config_files import CONFIGS

STAND_INS = {
    "gsm8k": ["--data.train=questions.jsonl", "--data.val=4", *SHORT],
    "reasoning_gym": ["--data.train_size=32", "--data.val_size=4", *SHORT],
    "distillation": ["--data.train=prompts.jsonl", "--model.reference=tiny"],
    "quickstart": [
        "--data.train_size=32",
        "--data.val_size=4",
        "--data.batch_size=4",
        "--model.sampling.max_new_tokens=4",
    ],
    "shaping": [
        "--data.train_size=32",
        "--data.val_size=4",
        "--data.batch_size=4",
        "--model.sampling.max_new_tokens=4",
    ],
    "rloo": ["--data.train=prompts.jsonl", "--model.rewards+=mine.words", *SHORT],
    "grpo": ["--data.train=prompts.jsonl", "--model.rewards+=mine.words", *SHORT],
    "reinforce": ["--data.train=prompts.jsonl", "--model.rewards+=mine.words", *SHORT],
    "raft": ["--data.train=prompts.jsonl", "--model.rewards+=mine.words", *SHORT],
    "vanilla_pg": ["--data.train=prompts.jsonl", "--model.rewards+=mine.words", *SHORT],
    "ppo": ["--data.train=prompts.jsonl", "--model.rewards+=mine.words", *SHORT],
    "dpo": ["--data.train=preferences.jsonl", "--data.batch_size=4"],
    "reviews": ["--data.train=reviews.jsonl", "--data.val=4", *SHORT],
    "sft": ["--data.train=demonstrations.jsonl", "--data.batch_size=4"],
    "reward_modeling": ["--data.train=preferences.jsonl", "--data.batch_size=4"],
}


SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
"""Not those in folders: tests/comparison and test_paper_configs run them."""


@pytest.mark.parametrize("given", [*SHIPPED, "dpo --model=IPO", "grpo --model=DrGRPO"])
def test_every_shipped_configuration_runs_and_its_checkpoint_exports(given, workspace):
    name, *flags = given.split()
    policy = [] if name in ("quickstart", "shaping") else ["--model.policy=tiny"]
    main(["fit", "--config", name, *flags, *policy, *STAND_INS[name], *FAST, "--trainer.default_root_dir=here"])
    assert list(workspace.glob("here/policy/last/*.safetensors"))
    assert list(workspace.glob("here/version_0/metrics.csv"))
    assert {path.name for path in workspace.iterdir()} - {"here", "__pycache__"} == {
        "tiny", "mine.py", "prompts.jsonl", "demonstrations.jsonl", "preferences.jsonl", "questions.jsonl",
        "reviews.jsonl"
    }  # fmt: skip
    ckpt = next(workspace.glob("here/version_0/checkpoints/last.ckpt"))
    main(["export", "--ckpt_path", str(ckpt), "--out", "exported"])
    exported, fitted = load_weights(Path("exported")), load_weights(Path("here/policy/last"))
    assert exported.keys() == fitted.keys() and not any("critic" in weight for weight in exported)
    assert all(torch.equal(weight, fitted[key]) for key, weight in exported.items())


EVERY_UPDATE = """
    train/loss train/reward train/reward/review_reward train/return train/kl train/kl_k3 train/kl_coef train/entropy
    train/completion_length train/eos_rate train/advantage_std train/zero_variance_groups train/skipped_groups
    train/grad_norm train/logprob_mismatch train/lr train/kl_p05 train/kl_p50 train/kl_p95
    time/sample time/score time/train throughput/completion_tokens
""".split()
EVERY_VALIDATION = """
    val/reward val/reward_variance val/return val/judge val/win_rate val/win_rate_low val/win_rate_high val/undecided
    val/kl val/length val/eos_rate val/distinct_1 val/distinct_2 val/perplexity
""".split()


def test_the_quickstart_logs_every_update_and_the_initial_validation(workspace):
    main(["fit", "--config", "quickstart", *STAND_INS["quickstart"], *FAST, "--trainer.default_root_dir=here"])
    with next(workspace.glob("here/version_0/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    for name in EVERY_UPDATE:
        values = [row[name] for row in rows if row[name]]
        assert len(values) == 2 and all(math.isfinite(float(value)) for value in values), name
    validations = [row for row in rows if row["val/reward"]]
    assert len(validations) == 2 and validations[0]["step"] == "0"
    assert all(row[name] for row in validations for name in EVERY_VALIDATION)
    assert rows.index(validations[0]) < rows.index(next(row for row in rows if row["train/loss"]))


def test_rollout_callbacks_from_flags(workspace):
    growing = ["--trainer.callbacks+=lit_rlhf.callbacks.BatchSchedule", "--trainer.callbacks.maximum=8"]
    noise = ["--trainer.callbacks+=lit_rlhf.callbacks.GradientNoise", "--trainer.callbacks.every_n_rollouts=1"]
    fit(*growing, "--trainer.callbacks.updates=2", *noise)
    header = next(workspace.glob("here/version_0/metrics.csv")).read_text().splitlines()[0]
    assert "train/prompts" in header and "train/gradient_variance" in header


def test_a_run_resumes_from_its_checkpoint(workspace):
    def rows_of(version):
        with (workspace / "here" / version / "metrics.csv").open() as file:
            return [row for row in csv.DictReader(file) if row["train/loss"]]

    fit()
    fit("--trainer.max_steps=4", "--ckpt_path=here/version_0/checkpoints/last.ckpt")
    before, after = rows_of("version_0"), rows_of("version_1")
    assert [row["step"] for row in (*before, *after)] == ["0", "1", "2", "3"]
    assert float(after[0]["time/total"]) > float(before[-1]["time/total"]) > 0  # time continues, too


def test_two_runs_into_one_folder_are_both_kept(workspace):
    fit()
    fit()
    assert len(list(workspace.glob("here/version_*/metrics.csv"))) == 2
    assert len(list(workspace.glob("here/version_*/samples.jsonl"))) == 2
    assert len(list(workspace.glob("here/version_*/events*"))) == 2


def test_a_users_method_and_reward(workspace, capsys):
    fit("--model=mine.ByLength")
    header = next(workspace.glob("here/version_0/metrics.csv")).read_text().splitlines()[0]
    assert "train/reward/words" in header and "train/kl" in header
    assert "class_path: mine.ByLength" in next(workspace.glob("here/version_0/config.yaml")).read_text()


@pytest.mark.parametrize("lora", ["null", "{r: 2}"])
def test_export_of_a_checkpoint_equals_the_policy_that_fit_wrote(lora, workspace, capsys):
    fit(f"--model.lora={lora}")
    ckpt = next(workspace.glob("here/version_0/checkpoints/last.ckpt"))
    main(["export", "--ckpt_path", str(ckpt), "--out", "exported"])
    names = {path.name for path in Path("exported").iterdir()}
    assert names == {path.name for path in Path("here/policy/last").iterdir()} - {"README.md"} | (names & {"README.md"})
    weights = [load_weights(Path(folder)) for folder in ("exported", "here/policy/last")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert AutoTokenizer.from_pretrained("exported").chat_template


def load_weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(next(folder.glob("*.safetensors")))


def test_export_merges_an_adapter(workspace):
    fit("--model.lora={r: 2, init_lora_weights: false}")
    ckpt = next(workspace.glob("here/version_0/checkpoints/last.ckpt"))
    main(["export", "--ckpt_path", str(ckpt), "--out", "merged", "--merge=true"])
    from peft import AutoPeftModelForCausalLM

    ids = torch.arange(8, 20).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()(ids).logits
    adapted = AutoPeftModelForCausalLM.from_pretrained("here/policy/last").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)


def test_trainer_flags_disable_default_callbacks(workspace, capsys):
    fit("--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false")
    assert not list(workspace.glob("here/policy")) and not list(workspace.glob("here/version_0/checkpoints"))
    assert "step 1" not in capsys.readouterr().out


def test_predict_writes_completions_and_scores(workspace):
    common = ["--model.policy=tiny", "--data.train=prompts.jsonl", "--data.val=6", "--trainer.default_root_dir=here"]
    predict = ["predict", "--config=rloo", *common, "--model.rewards+=mine.words", *SHORT, "--trainer.accelerator=cpu"]
    main(predict)
    rows = [json.loads(line) for line in Path("here/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * 4
    assert all(row["reward"] == len(row["completion"].split()) for row in rows)
    main([*predict, "--trainer.fast_dev_run=1"])  # writes nothing
    assert len(Path("here/predictions.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_policy_is_evaluated_without_training(command, workspace, capsys):
    common = ["--model.policy=tiny", "--data.train=prompts.jsonl", "--data.val=6", "--trainer.default_root_dir=here"]
    main([command, "--config=rloo", *common, "--model.rewards+=mine.words", *SHORT, "--trainer.accelerator=cpu"])
    prefix = {"validate": "val", "test": "test"}[command]
    assert f"{prefix}/win_rate" in capsys.readouterr().out


def test_the_pipeline_on_a_users_data(workspace):
    """SFT, then a reward model, then RLOO, then export: each reads the output of the one before."""
    small = [*FAST, "--data.batch_size=4", "--trainer.enable_model_summary=false"]
    main(["fit", "--config=sft", "--model.policy=tiny", "--data.train=demonstrations.jsonl", *small])
    sft = "runs/sft/policy/last"
    main(["fit", "--config=reward_modeling", f"--model.policy={sft}", "--data.train=preferences.jsonl", *small])
    reward_model = "runs/reward_model/policy/last"
    assert AutoModelForSequenceClassification.from_pretrained(reward_model).config.num_labels == 1
    rewards = ["--model.rewards+=lit_rlhf.RewardModel", f"--model.rewards.model={reward_model}"]
    prompts = ["--data.train=prompts.jsonl", "--data.val=4", "--model.sampling.max_new_tokens=4"]
    main(["fit", "--config=rloo", f"--model.policy={sft}", *rewards, *prompts, *small])
    ckpt = next(Path("runs/rloo").glob("version_0/checkpoints/last.ckpt"))
    main(["export", "--ckpt_path", str(ckpt), "--out", "my-model", "--merge=true"])
    AutoModelForCausalLM.from_pretrained("my-model").generate(torch.tensor([[1, 9, 9]]), max_new_tokens=2)


ENDING = """
import os, signal
from lightning.pytorch import Callback

class End(Callback):
    def __init__(self, signals: list[int]):
        self.signals = signals

    def on_train_batch_start(self, *args):
        for number in self.signals:
            os.kill(os.getpid(), number)

    on_test_batch_start = on_train_batch_start
"""


@pytest.fixture
def interruptible():
    """Handle Ctrl-C also in a background job, whose shell makes it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signals", [[15], [2], [2, 2]], ids=str)
def test_a_run_ended_by_a_signal_exits_with_its_code(signals, workspace):
    (workspace / "ending.py").write_text(ENDING)
    with pytest.raises(SystemExit) as stopped:
        fit("--trainer.callbacks+=ending.End", f"--trainer.callbacks.signals={signals}", "--trainer.max_steps=9")
    assert stopped.value.code == 128 + signals[0]
    saved = list(Path("here").rglob("last.ckpt"))
    assert len(saved) == (signals != [2, 2])  # the second Ctrl-C comes before the first update


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [15, 2])
def test_an_evaluation_ended_by_a_signal_exits_with_its_code(number, workspace):
    (workspace / "ending.py").write_text(ENDING)
    common = ["--model.policy=tiny", "--data.val=prompts.jsonl", "--data.eval_batch_size=2", *SHORT]
    end = ["--trainer.callbacks+=ending.End", f"--trainer.callbacks.signals=[{number}]"]
    with pytest.raises(SystemExit) as stopped:
        main(["test", "--config=rloo", *common, "--model.rewards+=mine.words", *end, "--trainer.accelerator=cpu"])
    assert stopped.value.code == 128 + number


def test_out_of_memory_in_a_training_step_names_the_options_and_saves(workspace, monkeypatch, capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    monkeypatch.setattr(torch.autograd, "backward", Mock(side_effect=[DEFAULT, error], wraps=torch.autograd.backward))
    with pytest.raises(SystemExit) as stopped:
        fit()
    (message,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert stopped.value.code == 1 and "lit-rlhf: CUDA out of memory: train on fewer rows at a time by" in message
    assert torch.load("here/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 1


def test_help_and_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("fit", "validate", "test", "predict", "export", "compare", "memory"))
    main(["--version"])
    assert capsys.readouterr().out == f"lit-rlhf {lit_rlhf.__version__}\n"
