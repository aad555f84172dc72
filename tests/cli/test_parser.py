"""Configurations by name, file, class or inline YAML, and functions as commands."""

import json
import sys
from pathlib import Path

import pytest

from commands import SHORT, fit
from lit_rlhf.cli.config_files import CONFIGS, UsageError, expand_configs
from lit_rlhf.cli.main import parse_error
from lit_rlhf.cli.parser import call_function


def test_names_of_shipped_configurations_become_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("trainer: {}\n")
    path = str(CONFIGS / "paper" / "hh.yaml")
    assert expand_configs(["--config", "paper/hh", "--config=configs/paper/hh.yaml"]) == [
        "--config",
        path,
        f"--config={path}",
    ]
    unchanged = ["-c", "mine.yaml", "--config={trainer: {max_steps: 1}}", "--out", "rloo"]
    assert expand_configs(unchanged) == unchanged
    with pytest.raises(
        UsageError,
        match=r"'../pyproject' is neither a file nor a shipped configuration: the shipped ones are distillation, dpo, ",
    ):
        expand_configs(["--config", "../pyproject"])


def test_a_configuration_of_a_class(workspace):
    Path("mine.yaml").write_text("class_path: RLOO\ninit_args: {num_samples: 2, rewards: [mine.words]}\n")
    fit("--model=mine.yaml", "--model.policy=tiny", *SHORT)
    assert "num_samples: 2" in next(workspace.glob("here/version_0/config.yaml")).read_text()


def test_a_long_inline_configuration(workspace):
    fit("--config", json.dumps({"model": {"init_args": {"sampling": {"stop": ["never written by anyone " * 20]}}}}))
    assert next(workspace.glob("here/version_0/metrics.csv")).is_file()


def greet(name: str, times: int = 1, *, words: tuple[str, ...] = ()) -> str:
    """Greet somebody.

    Args:
        name: Whom.
        times: How often.
        words: With which words.
    """
    return " ".join([*words * times, name])


def test_a_function_is_a_command(capsys):
    assert call_function(greet, "greet", ["--name=you", "--times=2"], words=("hello",)) == "hello hello you"
    with pytest.raises(UsageError, match="there is no option --words"):
        call_function(greet, "greet", ["--name=you", "--words=[hello]"], words=())
    with pytest.raises(SystemExit):
        call_function(greet, "greet", ["--help"], words=())
    help_text = capsys.readouterr().out
    assert "Greet somebody." in help_text and "How often." in help_text and "--words" not in help_text


def test_a_command_line_is_checked_without_running_it(workspace, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lit-rlhf", "compare"])
    command = ["fit", "--config", "quickstart"]
    assert parse_error(command) is None
    assert parse_error([*command, "--model.num_sample=4"]).endswith("did you mean --model.num_samples?")
    assert parse_error([*command, "--config", "quikstart"]).startswith("--config 'quikstart' is neither a file")
    assert sys.argv == ["lit-rlhf", "compare"] and not Path("runs").exists()
