"""What users type, run as they would type it, with tiny stand-ins for models and data."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lit_rlhf
from lit_rlhf.cli.main import CONFIGS, main
from tiny import make_llama, make_tokenizer

MINE = """
import lit_rlhf

class OPO(lit_rlhf.RLOO):
    def advantages(self, rollout):
        lengths = rollout.completions.lengths * rollout.valid
        total = lengths.sum(1, keepdim=True).clamp(min=1)
        return rollout.returns - (rollout.returns * lengths).sum(1, keepdim=True) / total

class Slip(lit_rlhf.RLOO):
    def loss(self, rollout):
        return super().loss(rollout)[0]  # and no metrics

def words(completions, **kwargs):
    return [float(len(text.split())) for text in completions]
"""

FAST = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
SHORT = ["--model.max_new_tokens=4", "--data.batch_size=4"]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder with a tiny model, data of every kind, and the user's own module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setitem(sys.modules, "mine", None)
    sys.modules.pop("mine")
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    texts = [f"the {word} number {i} was long" for i in range(8) for word in ("film", "book", "play", "song")]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text, "answer": text[4:8]} for text in texts])
    write_rows(tmp_path / "demonstrations.jsonl", [{"prompt": text, "completion": " and good"} for text in texts])
    pairs = [{"prompt": text, "chosen": f" good {i}", "rejected": f" bad {-i}"} for i, text in enumerate(texts)]
    write_rows(tmp_path / "preferences.jsonl", pairs)
    write_rows(tmp_path / "reviews.jsonl", [{"text": f"{text} and rather nice to see"} for text in texts])
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


STAND_INS = {
    "quickstart": ["--data.train_size=32", "--data.val_size=4", "--data.batch_size=4", "--model.max_new_tokens=4"],
    "shaping": ["--data.train_size=32", "--data.val_size=4", "--data.batch_size=4", "--model.max_new_tokens=4"],
    "rloo": ["--data.train=prompts.jsonl", "--model.rewards+=mine.words", *SHORT],
    "reinforce": ["--data.train=prompts.jsonl", "--model.rewards+=mine.words", *SHORT],
    "raft": ["--data.train=prompts.jsonl", "--model.rewards+=mine.words", *SHORT],
    "vanilla_pg": ["--data.train=prompts.jsonl", "--model.rewards+=mine.words", *SHORT],
    "ppo": ["--data.train=prompts.jsonl", "--model.rewards+=mine.words", *SHORT],
    "dpo": ["--data.train=preferences.jsonl", "--data.batch_size=4"],
    "reviews": ["--data.train=reviews.jsonl", "--data.val=4", *SHORT],
    "sft": ["--data.train=demonstrations.jsonl", "--data.batch_size=4"],
    "reward_modeling": ["--data.train=preferences.jsonl", "--data.batch_size=4"],
}


SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))  # those in folders: test_compare, test_paper_configs


@pytest.mark.parametrize("given", [*SHIPPED, "dpo --model=IPO"])
def test_every_configuration_that_ships_runs_and_its_checkpoint_exports(given, place):
    name, *flags = given.split()
    policy = [] if name in ("quickstart", "shaping") else ["--model.policy=tiny"]
    main(["fit", "--config", name, *flags, *policy, *STAND_INS[name], *FAST, "--trainer.default_root_dir=here"])
    assert list(place.glob("here/policy/last/*.safetensors"))
    assert list(place.glob("here/version_0/metrics.csv"))
    assert {path.name for path in place.iterdir()} - {"here", "__pycache__"} == {
        "tiny", "mine.py", "prompts.jsonl", "demonstrations.jsonl", "preferences.jsonl", "reviews.jsonl"
    }  # fmt: skip
    main(["export", "--ckpt_path", str(next(place.glob("here/version_0/checkpoints/last.ckpt"))), "--out", "exported"])
    exported, fitted = load_weights(Path("exported")), load_weights(Path("here/policy/last"))
    assert exported.keys() == fitted.keys() and not any("critic" in weight for weight in exported)
    assert all(torch.equal(weight, fitted[key]) for key, weight in exported.items())


EVERY_UPDATE = """
    train/loss train/reward train/reward/review_reward train/return train/kl train/kl_k3 train/kl_coef train/entropy
    train/completion_length train/eos_rate train/advantage_std train/zero_variance_groups train/skipped_groups train/grad_norm
    train/logprob_mismatch train/lr train/kl_p05 train/kl_p50 train/kl_p95
    time/sample time/score time/train throughput/completion_tokens
""".split()
EVERY_VALIDATION = """
    val/reward val/reward_variance val/return val/judge val/win_rate val/win_rate_low val/win_rate_high val/undecided
    val/kl val/length val/eos_rate val/distinct_1 val/distinct_2 val/perplexity
""".split()


def test_the_quickstart_logs_every_update_and_what_was_before_the_first(place):
    main(["fit", "--config", "quickstart", *STAND_INS["quickstart"], *FAST, "--trainer.default_root_dir=here"])
    with next(place.glob("here/version_0/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    for name in EVERY_UPDATE:
        values = [row[name] for row in rows if row[name]]
        assert len(values) == 2 and all(math.isfinite(float(value)) for value in values), name
    validations = [row for row in rows if row["val/reward"]]
    assert len(validations) == 2 and validations[0]["step"] == "0"
    assert all(row[name] for row in validations for name in EVERY_VALIDATION)
    assert rows.index(validations[0]) < rows.index(next(row for row in rows if row["train/loss"]))


def fit(*args: str) -> None:
    common = ["--model.policy=tiny", "--data.train=prompts.jsonl", "--data.val=4", "--trainer.default_root_dir=here"]
    main(["fit", "--config=rloo", *common, "--model.rewards+=mine.words", *SHORT, *FAST, *args])


def test_callbacks_of_rollouts_by_flags(place):
    growing = ["--trainer.callbacks+=lit_rlhf.callbacks.BatchSchedule", "--trainer.callbacks.maximum=8"]
    noise = ["--trainer.callbacks+=lit_rlhf.callbacks.GradientNoise", "--trainer.callbacks.every_n_rollouts=1"]
    fit(*growing, "--trainer.callbacks.updates=2", *noise)
    header = next(place.glob("here/version_0/metrics.csv")).read_text().splitlines()[0]
    assert "train/prompts" in header and "train/gradient_variance" in header


def test_a_run_goes_on_from_its_checkpoint(place):
    def rows_of(version):
        with (place / "here" / version / "metrics.csv").open() as file:
            return [row for row in csv.DictReader(file) if row["train/loss"]]

    fit()
    fit("--trainer.max_steps=4", "--ckpt_path=here/version_0/checkpoints/last.ckpt")
    before, after = rows_of("version_0"), rows_of("version_1")
    assert [row["step"] for row in (*before, *after)] == ["0", "1", "2", "3"]
    assert float(after[0]["time/total"]) > float(before[-1]["time/total"]) > 0  # the clock goes on, too


def test_two_runs_into_one_folder_leave_both(place):
    fit()
    fit()
    assert len(list(place.glob("here/version_*/metrics.csv"))) == 2
    assert len(list(place.glob("here/version_*/samples.jsonl"))) == 2
    assert len(list(place.glob("here/version_*/events*"))) == 2


def test_a_method_and_a_reward_of_ones_own(place, capsys):
    fit("--model=mine.OPO")
    header = next(place.glob("here/version_0/metrics.csv")).read_text().splitlines()[0]
    assert "train/reward/words" in header and "train/kl" in header
    assert "class_path: mine.OPO" in next(place.glob("here/version_0/config.yaml")).read_text()


@pytest.mark.parametrize("lora", ["null", "{r: 2}"])
def test_a_checkpoint_alone_exports_what_fit_exported(lora, place, capsys):
    fit(f"--model.lora={lora}")
    ckpt = next(place.glob("here/version_0/checkpoints/last.ckpt"))
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


def test_an_adapter_is_merged_on_demand(place):
    fit("--model.lora={r: 2, init_lora_weights: false}")
    ckpt = next(place.glob("here/version_0/checkpoints/last.ckpt"))
    main(["export", "--ckpt_path", str(ckpt), "--out", "merged", "--merge=true"])
    from peft import AutoPeftModelForCausalLM

    ids = torch.arange(8, 20).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()(ids).logits
    adapted = AutoPeftModelForCausalLM.from_pretrained("here/policy/last").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)


def test_a_comparison_does_not_take_the_configuration_of_a_method():
    with pytest.raises(SystemExit, match="is not for compare: it is for fit"):
        main(["compare", "--config", "quickstart"])


def test_a_configuration_may_be_given_as_a_class(place):
    Path("mine.yaml").write_text("class_path: RLOO\ninit_args: {num_samples: 2, rewards: [mine.words]}\n")
    fit("--model=mine.yaml", "--model.policy=tiny", *SHORT)
    assert "num_samples: 2" in next(place.glob("here/version_0/config.yaml")).read_text()


def test_what_the_trainer_is_told_to_leave_out_is_left_out(place, capsys):
    fit("--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false")
    assert not list(place.glob("here/policy")) and not list(place.glob("here/version_0/checkpoints"))
    assert "step 1" not in capsys.readouterr().out


def test_a_slip_of_ones_own_method_has_its_traceback(place):
    with pytest.raises(ValueError, match=r"(too many|not enough) values to unpack"):
        fit("--model=mine.Slip")


def test_predict_writes_completions_and_scores(place):
    common = ["--model.policy=tiny", "--data.train=prompts.jsonl", "--data.val=6", "--trainer.default_root_dir=here"]
    predict = ["predict", "--config=rloo", *common, "--model.rewards+=mine.words", *SHORT, "--trainer.accelerator=cpu"]
    main(predict)
    rows = [json.loads(line) for line in Path("here/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * 4
    assert all(row["reward"] == len(row["completion"].split()) for row in rows)
    main([*predict, "--trainer.fast_dev_run=1"])  # writes nothing
    assert len(Path("here/predictions.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_policy_is_scored_without_training(command, place, capsys):
    common = ["--model.policy=tiny", "--data.train=prompts.jsonl", "--data.val=6", "--trainer.default_root_dir=here"]
    main([command, "--config=rloo", *common, "--model.rewards+=mine.words", *SHORT, "--trainer.accelerator=cpu"])
    prefix = {"validate": "val", "test": "test"}[command]
    assert f"{prefix}/win_rate" in capsys.readouterr().out


def test_the_pipeline_on_ones_own_data(place):
    """SFT, then a reward model, then RLOO, then export: each takes what the one before it wrote."""
    small = [*FAST, "--data.batch_size=4", "--trainer.enable_model_summary=false"]
    main(["fit", "--config=sft", "--model.policy=tiny", "--data.train=demonstrations.jsonl", *small])
    sft = "runs/sft/policy/last"
    main(["fit", "--config=reward_modeling", f"--model.policy={sft}", "--data.train=preferences.jsonl", *small])
    reward_model = "runs/reward_model/policy/last"
    assert AutoModelForSequenceClassification.from_pretrained(reward_model).config.num_labels == 1
    rewards = ["--model.rewards+=lit_rlhf.RewardModel", f"--model.rewards.model={reward_model}"]
    prompts = ["--data.train=prompts.jsonl", "--data.val=4", "--model.max_new_tokens=4"]
    main(["fit", "--config=rloo", f"--model.policy={sft}", *rewards, *prompts, *small])
    ckpt = next(Path("runs/rloo").glob("version_0/checkpoints/last.ckpt"))
    main(["export", "--ckpt_path", str(ckpt), "--out", "my-model", "--merge=true"])
    AutoModelForCausalLM.from_pretrained("my-model").generate(torch.tensor([[1, 9, 9]]), max_new_tokens=2)


WRONG = {
    "a misspelt method": (["--model=RLO"], "did you mean RLOO?"),
    "a misspelt option": (["--model.num_sample=4"], "num_sample"),
    "a misspelt reward": (["--model.rewards=[mine.wordz]"], "wordz"),
    "one sample": (["--model.num_samples=1"], "num_samples=1 must be at least 2"),
    "no rewards": (["--model.rewards=[]"], "rewards is empty"),
    "a policy that is not there": (["--model.policy=./nowhere"], "there is no such folder"),
    "a file that is not there": (["--data.train=nothing.jsonl"], "nothing.jsonl"),
    "more slices than prompts": (["--model.num_minibatches=8"], "num_minibatches=8 is more than the 4 prompts"),
    "an accumulation that does not fit": (
        ["--model.num_minibatches=4", "--trainer.accumulate_grad_batches=3"],
        "accumulate_grad_batches=3 does not fit a rollout of 4 slices",
    ),
    "an update of several passes": (
        ["--model=PPO", "--model.num_samples=1", "--model.update_epochs=2", "--trainer.accumulate_grad_batches=2"],
        "accumulate_grad_batches=2 does not fit a rollout of 1 slices",
    ),
    "overfit_batches": (["--trainer.overfit_batches=1"], "overfit_batches"),
    "data where a class must be": (["--data=prompts.jsonl"], "did you mean --data.train?"),
    "a policy that is nowhere": (["--model.policy=nowhere"], "'nowhere' is no folder here that holds a model"),
    "a configuration of comparisons": (["--config=paper/testbed"], "it is for `lit-rlhf compare`"),
    "an unknown option of LoRA": (["--model.lora.rank=4"], "rank"),
    "an unknown option of sampling": (["--model.sampling.top=4"], "top"),
    "a column that is not there": (["--data.prompt_column=question"], "question"),
    "an opponent that is no column": (["--model.compare_to=gpt"], "compare_to='gpt' is no column"),
    "data of another method": (["--model=DPO"], "DPO learns from Preferences and PromptData yields Prompts"),
    "too few prompts": (["--data.batch_size=64"], "64"),
    "weights that cannot move": (
        ["--model.load.dtype=bfloat16", "--model.lora=null", "--model.optimizer.lr=1e-7"],
        "too small to move",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_gets_a_sentence(wrong, place, capsys):
    args, sentence = WRONG[wrong]
    with pytest.raises(SystemExit) as stopped:
        fit(*args)
    assert stopped.value.code not in (0, None)
    assert sentence in capsys.readouterr().err + str(stopped.value.code)
    assert not Path("here/policy").exists()


def test_a_reward_that_raises_is_named_and_its_traceback_kept(place):
    (place / "broken.py").write_text("def broken(completions, **kwargs):\n    return completions[0] / 2\n")
    with pytest.raises(RuntimeError, match="the reward 'broken' raised TypeError"):
        fit("--model.rewards+=broken.broken")


def test_a_configuration_may_be_written_out_and_long(place):
    fit("--config", json.dumps({"model": {"init_args": {"sampling": {"stop": ["never said by anyone " * 20]}}}}))
    assert next(place.glob("here/version_0/metrics.csv")).is_file()


def test_an_unknown_configuration_lists_those_that_ship(place):
    with pytest.raises(SystemExit, match="quickstart"):
        main(["fit", "--config", "quikstart"])


def test_a_run_that_a_signal_ended_is_not_taken_for_a_finished_one(place):
    (place / "ending.py").write_text(
        "import os, signal\nfrom lightning.pytorch import Callback\n\nclass End(Callback):\n"
        "    def on_train_batch_start(self, *args):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    with pytest.raises(SystemExit) as stopped:
        fit("--trainer.callbacks+=ending.End")
    assert stopped.value.code == 128 + 15
    assert next(Path("here").rglob("last.ckpt")).is_file()


def test_without_a_command_it_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("fit", "validate", "test", "predict", "export", "compare"))
    main(["--version"])
    assert capsys.readouterr().out == f"lit-rlhf {lit_rlhf.__version__}\n"
