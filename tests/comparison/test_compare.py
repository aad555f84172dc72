"""`lit-rlhf compare`: its options, sweeps, and the shipped comparisons."""

import math
import re

import pytest
import yaml

from comparisons import SHORT, read_table, write_config
from lit_rlhf.cli import main
from lit_rlhf.cli.config_files import CONFIGS
from lit_rlhf.comparison import compare as compare_module
from lit_rlhf.comparison.compare import sweep
from lit_rlhf.comparison.runs import Arm, run_folder


def test_only_the_chosen_arms_run(workspace, fake_runs):
    write_config(workspace, {"one": {}, "two": {}})
    main(["compare", "--config", "mine.yaml", "--only", "[two]"])
    assert not run_folder(workspace / "here", "one", 1).exists()
    assert list(read_table(workspace)) == ["two"]


def test_a_sweep_runs_every_learning_rate_and_nothing_else(workspace, fake_runs):
    write_config(workspace, {"start": {}, "good": {"fit": []}}, cost={"fit": ["--few"]})
    main(["compare", "--config", "mine.yaml", "--learning_rates", "[1e-6, 1e-5, 1e-4]"])
    rates = [args[args.index("--model.optimizer.lr") + 1] for args, _ in fake_runs.commands if args[0] == "fit"]
    assert rates == ["1e-06", "1e-05", "0.0001"]
    assert "| good | 1e-06 | 1 |" in (workspace / "here" / "table.md").read_text()


def test_the_output_folder_may_be_in_the_home_folder(workspace, fake_runs, monkeypatch):
    monkeypatch.setenv("HOME", str(workspace / "home"))
    write_config(workspace, {"one": {}})
    main(["compare", "--config", "mine.yaml", "--out", "~/here"])
    assert (workspace / "home" / "here" / "table.md").exists() and not (workspace / "~").exists()
    assert all("~" not in arg for args, _ in fake_runs.commands for arg in args)


def test_a_sweep_gives_every_trained_arm_every_learning_rate():
    arms = {"SFT": Arm(), "RLOO": Arm(fit=[]), "DPO": Arm(fit=["--model", "DPO"], test=["--x"])}
    swept = sweep(arms, [1e-4, 1e-3])
    assert list(swept) == ["RLOO, lr 0.0001", "RLOO, lr 0.001", "DPO, lr 0.0001", "DPO, lr 0.001"]
    assert swept["DPO, lr 0.001"] == Arm(fit=["--model", "DPO", "--model.optimizer.lr", "0.001"], test=["--x"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--only=[three]"], "three.*the arms are one"),
        (["--pairs=[[one, four]]"], "four.*the arms are one"),
        (["--contrasts={x: [[one], [five]]}"], "five.*the arms are one"),
        (["--contrasts={x: [[one], []]}"], r"contrasts \['x'\]: name at least one arm on each side"),
        (["--seeds=[]"], "seeds"),
        (["--seeds=[1, 2, 1]"], r"seeds=\[1, 2, 1\]: a seed occurs twice"),
        (["--jobs=0"], "jobs=0"),
        (["--arms={}"], "0 arms"),
        (["--arms={..: {}}"], "the arm '..' needs a letter or a digit in its name"),
        (["--arms={k=1: {}, k 1: {}}"], "'k=1' and 'k 1' would write into one folder"),
        (["--cost={fit: [], rounds: 0}"], "cost.rounds=0 must be at least 1"),
        (["--learning_rates=[1e-4]"], "0 arms"),
        (["--learning_rates=[1e-4]", "--only=[one]", "--arms={one: {}, two: {fit: []}}"], "0 arms"),
        (["--learning_rates=[0, -1e-4]"], r"learning_rates=\[0.0, -0.0001\] must be above 0"),
    ],
    ids=str,
)
def test_an_invalid_option_gets_a_sentence(options, sentence, workspace, capsys):
    write_config(workspace, {"one": {}})
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", "mine.yaml", *options])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and re.search(sentence, error) and "Traceback" not in error


def test_arguments_of_all_arms_are_checked_before_any_run(workspace, capsys):
    write_config(workspace, {"good": {"fit": []}, "typo": {"fit": ["--model.num_sample", "4"]}})
    with pytest.raises(SystemExit):
        main(["compare", "--config", "mine.yaml"])
    sentence = r"the arm 'typo': lit-rlhf fit rejects its arguments: --model\.num_sample: .* --model\.num_samples\?"
    assert re.search(sentence, capsys.readouterr().err)
    assert not (workspace / "here").exists()


@pytest.mark.parametrize(
    "name",
    [
        "paper/testbed",
        "paper/sweep",
        pytest.param("paper/ablations", marks=pytest.mark.slow),
        "paper/cost",
        "paper/reviews",
        "field/testbed",
        pytest.param("field/testbed field/sweep", marks=pytest.mark.slow),
        "field/length",
        "field/rates",
        "field/scale",
    ],
)
def test_the_arguments_of_a_shipped_comparison_are_valid(name, workspace, monkeypatch):
    runs = []
    monkeypatch.setattr(compare_module, "run_all", lambda new, run_one, jobs: runs.extend(new) or [])
    configs = [part for config in name.split() for part in ("--config", config)]
    main(["compare", *configs, *(["--learning_rates", "[1e-3]"] if name.endswith("sweep") else [])])
    arms = yaml.safe_load((CONFIGS / f"{name.split()[0]}.yaml").read_text())["arms"]
    assert {run.arm.partition(", lr")[0] for run in runs} == set(arms)


@pytest.mark.parametrize("name", ["paper/testbed", "field/testbed"])
def test_every_arm_of_a_testbed_comparison_samples_128_completions_per_rollout(name):
    """A pair is two completions, and ReMax decodes one more."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    quickstart = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    for name, arm in config["arms"].items():
        fit = arm.get("fit", [])
        options = dict(zip(fit[::2], fit[1::2], strict=True))
        samples = options.get("--model.num_samples", quickstart["model"]["init_args"]["num_samples"])
        rows = options.get("--data.batch_size", quickstart["data"]["init_args"]["batch_size"])
        assert int(rows) * (2 if name in ("DPO", "ReMax") else int(samples)) == 128, name
        updates = int(options.get("--model.updates.num_minibatches", 1))
        assert int(options.get("--trainer.max_steps", quickstart["trainer"]["max_steps"])) == 80 * updates, name
        assert arm.get("completions", config["completions"]) == 128 / updates, name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_arms_of_the_testbed_comparison_run(workspace):
    config = yaml.safe_load((CONFIGS / "paper" / "testbed.yaml").read_text())
    small = ["--data.train_size", "16", "--data.val_size", "4", "--data.batch_size", "4", "--trainer.max_steps", "1"]
    arms = {}
    for name, arm in config["arms"].items():
        shorter = SHORT[:2] if name != "DPO" else []  # it samples nothing
        arms[name] = {**arm, "fit": [*arm["fit"], *small, *shorter]} if "fit" in arm else arm
    test_args = [*config["test_args"], "--data.val_size", "4"]
    write_config(workspace, arms, fit_args=config["fit_args"], test_args=test_args)
    main(["compare", "--config", "mine.yaml"])
    table = read_table(workspace)
    assert {row["seeds"] for row in table.values()} == {"1"} and len(table) == len(config["arms"]) == 10
    assert all(math.isfinite(float(row["win_rate"])) for row in table.values())
