"""Statistics of results over seeds."""

import math

import pytest

from lit_rlhf.comparison.results import (
    confidence_interval,
    final_point,
    mean_validation_curve,
    student_t,
    validation_curve,
)


def test_the_confidence_interval_is_students():
    mean, half = confidence_interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.303 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-3)
    assert math.isnan(confidence_interval([1.0])[1])
    table = {15: 2.131, 16: 2.120, 20: 2.086, 30: 2.042, 120: 1.980}  # from a textbook
    assert {freedom: round(student_t(freedom), 3) for freedom in table} == pytest.approx(table, abs=1.1e-3)


def test_a_mean_curve_averages_validations_after_the_same_updates():
    rows = [{"step": step, "val/reward": float(step), "val/kl": 1.0, "val/judge": 2.0} for step in (0, 2, 4)]
    curves = [validation_curve(with_updates(some)) for some in (rows, rows[:1] + rows[2:])]
    assert [(p["step"], p["reward"]) for p in mean_validation_curve(curves)] == [(0, 0), (4, 4)]


def with_updates(validations):
    """Return the rows of a logger: the last update before each validation, then the validation."""
    return [row for v in validations for row in ({"step": v["step"] - 1, "time/total": float(v["step"])}, v)]


def test_a_pairwise_judge_is_represented_by_its_win_rate():
    row = {"step": 0, "val/reward": 1.0, "val/kl": 2.0, "val/win_rate": 0.75}
    assert validation_curve([row])[0]["judge"] == 0.75
    assert final_point({"metrics": {"win_rate": 0.5}, "curves": []})["judge"] == 0.5
