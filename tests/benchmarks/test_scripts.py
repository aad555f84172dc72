"""The benchmark scripts run, once and small."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lit_rlhf

HERE = Path(__file__).parent
POLICY = Path(lit_rlhf.__file__).parent / "testbed" / "assets" / "policy"


def run(script, *args, cwd):
    command = [sys.executable, str(HERE / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=True).stdout


@pytest.mark.slow
def test_update(tmp_path):
    few = ["--updates", 2, "--rounds", 1, "--contenders", "PPO", "--natural", "--out", tmp_path]
    output = run("update.py", "--model", POLICY, *few, cwd=tmp_path)
    assert output.count("| policy, 4 x 4, 40 + 32, natural ends |") == 2 and "matrix products" in output
    (measured,) = json.loads((tmp_path / "update.json").read_text())
    (together,) = measured["rounds"]
    assert all(len(together[name]["seconds"]) == 2 and min(together[name]["seconds"]) > 0 for name in ("PPO", "RLOO"))
    run("update.py", "--model", POLICY, *few, "--samples", 2, cwd=tmp_path)
    table = (tmp_path / "update.md").read_text()
    assert all(table.count(f"| policy, 4 x {k}, 40 + 32, natural ends |") == 2 for k in (2, 4))
    assert {path.name for path in tmp_path.iterdir()} == {"update.md", "update.json", "update.png"}


@pytest.mark.slow
def test_growth(tmp_path):
    output = run("growth.py", "--axes", "samples", "--updates", 2, "--rounds", 1, "--out", tmp_path, cwd=tmp_path)
    assert "| samples | 2: " in output
    points = json.loads((tmp_path / "growth.json").read_text())["samples"]
    assert {"2", "32"} <= set(points) and all(seconds > 0 for point in points.values() for seconds in point)


@pytest.mark.slow
def test_overhead(tmp_path):
    output = run("overhead.py", "--config", "quickstart", "--trainer.max_steps", 3, cwd=tmp_path)
    shares = dict(line.split(" | ")[::2] for line in output.splitlines() if line.endswith("% |"))
    assert set(shares) >= {"| tokenising", "| logging", "| callbacks", "| total"}
    assert 0 < float(shares["| total"].removesuffix("% |")) < 50


@pytest.mark.slow
def test_long_run(tmp_path):
    output = run("long_run.py", "--trainer.max_steps", 60, "--trainer.default_root_dir", tmp_path, cwd=tmp_path)
    rows = [line.split(" | ") for line in output.splitlines() if re.match(r"\| \d+ - ", line)]
    sizes = [int(row[3].removesuffix(" |")) for row in rows]
    assert [row[0] for row in rows][::9] == ["| 0 - 6", "| 54 - 60"]
    assert sizes[-1] < sizes[0] + 20  # the curves' points, of which there are at most a thousand each
