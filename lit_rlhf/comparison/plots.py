"""Figures of a comparison: reward against completions and seconds, over-optimization, and results with intervals."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_rlhf.comparison.results import (
    Results,
    confidence_interval,
    final_point,
    mean_point,
    mean_validation_curve,
    metric_values,
    validation_curve,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REWARD = "reward, greedy, held-out prompts"
INTERVALS = {"judge": "judge", "win_rate": "win rate", "reward": "reward", "return": "return", "kl": "KL"}
"""Metrics of `lit-rlhf test` in the figure with intervals, if any run has them, with their titles."""


def draw(path: Path, results: Results, completions: dict[str, float], costs: Results | None = None) -> None:
    """Plot reward against completions and against seconds, and the judge's score against the KL.

    Lines are means over the seeds at each validation. A star shows the final test of a method whose validations sample
    nothing. A dashed line shows the test of an arm without training.

    Args:
        path: File to write.
        results: Results of the arms.
        completions: Completions per update of each arm.
        costs: Measured costs. The seconds axis is updates times the measured seconds per update where there are any,
            otherwise the seconds of the runs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    _label(axes, "completions sampled" if any(count != 1 for count in completions.values()) else "updates")
    seconds = {name: statistics.median(metric_values(rows, "seconds")) for name, rows in (costs or {}).items() if rows}
    colors = plt.get_cmap("tab10" if len(results) <= 10 else "tab20")
    for i, (name, rows) in enumerate(results.items()):
        style: dict[str, Any] = {"color": colors(i % colors.N), "label": name}
        if curves := [curve for curve in (validation_curve(row["curves"]) for row in rows) if curve]:
            style["linestyle"] = ("-", ":")[i // colors.N % 2]  # more arms than colors
            _draw_curve(axes, mean_validation_curve(curves), completions[name], seconds.get(name), style)
        elif metric_values(rows, "reward"):
            _draw_point(
                axes, mean_point([final_point(row) for row in rows]), completions[name], seconds.get(name), style
            )
    if handles := axes[2].get_legend_handles_labels()[0]:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 10), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_intervals(path: Path, results: Results) -> None:
    """Plot the final test of each arm: one small dot per seed, and the mean with its 95 % interval.

    A dashed line is the mean of the first arm.

    Args:
        path: File to write, unless no run has a metric.
        results: Results of the arms.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values = {m: {name: metric_values(rows, m) for name, rows in results.items()} for m in INTERVALS}
    shown = [metric for metric, by_arm in values.items() if any(by_arm.values())]
    if not shown:
        return
    size = (2.0 + 2.8 * len(shown), 1.2 + 0.26 * len(results))
    figure, axes = plt.subplots(1, len(shown), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for panel, metric in zip(axes[0], shown, strict=True):
        panel.set(title=INTERVALS[metric])
        panel.grid(axis="x", alpha=0.25)
        _draw_intervals(panel, list(values[metric].values()))
    axes[0, 0].set_yticks(range(len(results)), list(results))
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_intervals(panel: Axes, values: list[list[float]]) -> None:
    """Plot one row per arm from the values of its seeds."""
    for row, seeds in enumerate(values):
        finite = [value for value in seeds if math.isfinite(value)]
        if not finite:
            continue
        mean, half = confidence_interval(finite)
        if row == 0:
            panel.axvline(mean, color="grey", linestyle="--", linewidth=0.8)
        panel.plot(finite, [row] * len(finite), ".", color="#9ab4d0", markersize=4)
        panel.errorbar(mean, row, xerr=0.0 if math.isnan(half) else half, fmt="o", color="#1f4e79", markersize=4)


def _label(axes: list[Axes], unit: str) -> None:
    titles = ("reward against completions", "reward against seconds", "judge against KL (over-optimization)")
    x_labels = (unit, "seconds of training", "KL to the reference, nats per completion")
    y_labels = (REWARD, REWARD, "judge's mean score (or win rate)")
    for panel, title, x, y in zip(axes, titles, x_labels, y_labels, strict=True):
        panel.set(title=title, xlabel=x, ylabel=y)
        panel.grid(alpha=0.25)


def _draw_curve(
    axes: list[Axes],
    points: list[dict[str, float]],
    completions: float,
    seconds_per_update: float | None,
    style: dict[str, Any],
) -> None:
    rewards = [point["reward"] for point in points]
    series = (
        ([point["step"] * completions for point in points], rewards),
        ([_seconds(point, seconds_per_update) for point in points], rewards),
        ([point["kl"] for point in points], [point["judge"] for point in points]),
    )
    for panel, (x, y) in zip(axes, series, strict=True):
        panel.plot(x, y, marker="o", markersize=3, linewidth=1.5, **style)


def _draw_point(
    axes: list[Axes],
    point: dict[str, float],
    completions: float,
    seconds_per_update: float | None,
    style: dict[str, Any],
) -> None:
    """Plot the final test as a star; the reward of an arm without training as a horizontal line."""
    spent = (point["step"] * completions, _seconds(point, seconds_per_update))
    for panel, x in zip(axes[:2], spent, strict=True):
        if point["step"]:
            _star(panel, x, point["reward"], style)
        else:
            panel.axhline(point["reward"], linestyle="--", linewidth=1, **style)
    _star(axes[2], point["kl"], point["judge"], style)


def _seconds(point: dict[str, float], seconds_per_update: float | None) -> float:
    return point["seconds"] if seconds_per_update is None else point["step"] * seconds_per_update


def _star(axes: Axes, x: float, y: float, style: dict[str, Any]) -> None:
    axes.plot([x], [y], marker="*", markersize=12, linestyle="none", **style)
