"""Two processes do what one with twice the prompts does: the same samples, the same update, the same metrics."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import processes

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def ended(ending, root) -> subprocess.CompletedProcess:
    """The script, started as a user would: one command, and the Trainer starts the other process.

    All its runs are in one start. The last is the one that fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PL_GLOBAL_SEED": str(processes.SEED)}
    command = [sys.executable, processes.__file__, str(ending), str(root)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=root)


def result(name: str, root: Path, ended: subprocess.CompletedProcess) -> dict:
    path = root / f"{name}.pt"
    assert path.exists(), ended.stderr[-5000:]
    return torch.load(path, weights_only=True)


@pytest.mark.filterwarnings("ignore:a prompt without a reward")
@pytest.mark.parametrize("case", processes.CASES)
def test_two_processes_are_one_with_twice_the_prompts(case, ended, root, ending, tmp_path):
    expected, actual = processes.run_case(case, ending, tmp_path, devices=1), result(case, root, ended)
    moved = max(float((expected["weights"][n] - start).abs().max()) for n, start in expected["start"].items())
    assert moved > 1e-2
    for name, weight in expected["weights"].items():
        ours = {name: actual["weights"][name]}
        torch.testing.assert_close(ours, {name: weight}, atol=2e-5 * moved, rtol=0)  # names what differs
    for ours, theirs in zip(actual["metrics"], expected["metrics"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4)
    if case.startswith("growing"):
        assert expected["metrics"][-1]["train/prompts"] == 12
    if case == "invalid on one rank":
        assert expected["metrics"][0]["train/skipped_groups"] == 0.5


def test_two_processes_find_what_one_does_in_validation(ended, root, ending, tmp_path):
    expected, actual = processes.run_validated(ending, tmp_path, devices=1), result("validated", root, ended)
    assert {"val/perplexity", "val/position_bias", "val/undecided", "val/reward_variance"} < expected.keys()
    assert 0 < expected["val/undecided"] < 1 and expected["val/position_bias"] != 0
    assert actual == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_a_run_of_two_processes_resumes_bitwise_in_the_middle_of_a_rollout(ended, root):
    differing = result("resumed", root, ended)
    assert len(differing) == 3
    assert not any(differing.values()), differing


def test_a_judge_that_raises_on_one_rank_stops_both(ended, root):
    said = result("failing judge", root, ended)
    assert "the judge failed" in said[1]
    assert "1 other process(es) failed while sampling or scoring" in said[0]


def test_a_reward_that_raises_on_one_rank_stops_both_with_its_message(ended, root):
    assert ended.returncode != 0
    assert "the disk of the judge is full" in ended.stderr
    assert "1 other process(es) failed while sampling or scoring" in ended.stderr
