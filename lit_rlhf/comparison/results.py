"""Results of the runs: reading what they wrote, and statistics over seeds."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_rlhf.errors import InputFileNotFoundError

Results = dict[str, list[dict[str, Any]]]
"""Results by arm, one for each seed: `seed`, `metrics` of the test, and `curves`, the rows of `metrics.csv`."""

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Two-sided 95 % quantiles of Student's t with 1 to 15 degrees of freedom."""


def newest_file(folder: Path, name: str, kind: str = "version") -> Path:
    """Return the file of this name in the newest `KIND_N` below a folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = sorted(folder.glob(f"{kind}_*/{name}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputFileNotFoundError(
            f"there is no {name} in {str(folder)!r}: was checkpointing or logging switched off?"
        )
    return found[-1]


def read_csv(path: Path) -> list[dict[str, float]]:
    """Read the rows of a `metrics.csv`, without the empty fields."""
    with path.open(encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def metric_values(rows: Iterable[dict[str, Any]], metric: str) -> list[float]:
    """Return the values of a metric in the results that have it."""
    return [row["metrics"][metric] for row in rows if metric in row["metrics"]]


def confidence_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % confidence interval (Student's t).

    The half width is NaN for a single value, and if any value is infinite.
    """
    mean = statistics.fmean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean, math.nan
    return mean, student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def student_t(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t; beyond the table by Fisher's expansion (to 0.001)."""
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def update_times(rows: list[dict[str, float]]) -> list[tuple[float, float]]:
    """Return `(updates, seconds)` so far for the rows of `metrics.csv` that have them; Lightning counts from 0."""
    return [(row["step"] + 1, row["time/total"]) for row in rows if "time/total" in row]


def final_point(result: dict[str, Any]) -> dict[str, float]:
    """Return a run's updates and seconds (0 without training) and the reward, KL and judge's score of its test."""
    updates, metrics = update_times(result["curves"]), result["metrics"]
    step, seconds = updates[-1] if updates else (0.0, 0.0)
    judge = metrics.get("judge", metrics.get("win_rate", math.nan))
    scores = {name: metrics.get(name, math.nan) for name in ("reward", "kl")}
    return {"step": step, "seconds": seconds, "judge": judge, **scores}


def validation_curve(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the validations of a run: updates and seconds before each, reward, KL and the judge's score."""
    points, step, seconds = [], 0.0, 0.0
    for row in rows:
        if "time/total" in row:
            step, seconds = update_times([row])[0]
        if "val/reward" in row:
            judge = row.get("val/judge", row.get("val/win_rate", math.nan))
            kl = row.get("val/kl", math.nan)
            points.append({"step": step, "seconds": seconds, "reward": row["val/reward"], "kl": kl, "judge": judge})
    return points


def mean_validation_curve(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Average validation curves over seeds, at the updates that all of them have."""
    by_step = [{point["step"]: point for point in points} for points in curves]
    shared = [step for step in by_step[0] if all(step in points for points in by_step)]
    return [mean_point([points[step] for points in by_step]) for step in shared]


def mean_point(points: list[dict[str, float]]) -> dict[str, float]:
    """Average one point over seeds."""
    return {name: statistics.fmean(point[name] for point in points) for name in points[0]}
