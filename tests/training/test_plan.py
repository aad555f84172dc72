"""What a run will do, and whether the CPU has room for it."""

import os

import pytest

from lit_rlhf.training.plan import Plan, cpu_advice, usable_cores


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (
            Plan(rows=16, accumulate=1, updates=200, num_samples=4, max_new_tokens=256),
            {
                "each rollout": "16 prompts x 4 completions of at most 256 tokens",
                "updates": "1 per rollout: on-policy",
                "sampled": "at most 3,276,800 tokens",
                "this run": "200 updates, 200 rollouts, 12,800 completions",
            },
        ),
        (
            Plan(rows=8, accumulate=4, updates=10, num_samples=2, max_new_tokens=5, done=3),
            {
                "each rollout": "8 prompts x 2 completions of at most 5 tokens",
                "updates": "1 per 4 rollouts: on-policy",
                "sampled": "at most 3,200 tokens",
                "this run": "10 updates, of which 3 are done, 40 rollouts, 640 completions",
            },
        ),
        (
            Plan(rows=8, accumulate=4, updates=10, num_samples=2, max_new_tokens=5, steps_per_rollout=4),
            {
                "each rollout": "8 prompts x 2 completions of at most 5 tokens",
                "updates": "1 per rollout: on-policy",
                "sampled": "at most 800 tokens",
                "this run": "10 updates, 10 rollouts, 160 completions",
            },
        ),
        (Plan(rows=4, accumulate=8, updates=30), {"each update": "32 rows", "this run": "30 updates"}),
        (
            Plan(rows=4, accumulate=1, updates=3, trained=1200, weights=50_000),
            {"trained": "1,200 of 50,000 weights", "each update": "4 rows", "this run": "3 updates"},
        ),
        (
            Plan(rows=0, accumulate=1, updates=float("inf")),
            {"each update": "rows of your loader", "this run": "updates until the time is over"},
        ),
    ],
    ids=str,
)
def test_the_sizes_of_a_run(plan, expected):
    assert plan.lines() == expected


@pytest.mark.parametrize(("corrected", "end"), [(True, "corrected by a ratio"), (False, "not corrected")])
def test_several_updates_per_rollout_are_off_policy(corrected, end):
    plan = Plan(rows=8, accumulate=2, updates=9, num_samples=2, steps_per_rollout=8, corrected=corrected)
    lines = plan.lines()
    assert lines["updates"] == f"4 per rollout: off-policy after the first, {end}"
    assert lines["this run"].startswith("9 updates, 3 rollouts")
    assert all(len(line) <= 80 - 14 for line in lines.values())


@pytest.mark.parametrize(
    ("threads", "load", "own", "advice"),
    [
        (4, 0.3, 0, ""),
        (4, 4.0, 0, "busy, other processes have a load of 4.0 on 4 cores: set OMP_NUM_THREADS=1"),
        (4, 4.0, 4, ""),
        (4, 8.0, 4, "busy, other processes have a load of 4.0 on 4 cores: set OMP_NUM_THREADS=1"),
        (1, 8.0, 0, ""),
        (8, 0.3, 0, "8 threads on 4 usable cores: set OMP_NUM_THREADS=4"),
    ],
)
def test_advice_for_a_busy_cpu(threads, load, own, advice, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr("lit_rlhf.training.plan.usable_cores", lambda: 4.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert cpu_advice(threads, own) == advice


def test_the_limit_of_a_container(tmp_path):
    limit = tmp_path / "cpu.max"
    everything = usable_cores(limit)
    assert everything >= 1
    limit.write_text("max 100000\n")
    assert usable_cores(limit) == everything
    limit.write_text("50000 100000\n")
    assert usable_cores(limit) == 0.5
