"""What a comparison leaves: a table of means with their intervals, and pictures of the courses."""

from __future__ import annotations

import csv
import math
import statistics
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = {
    "win_rate": "win rate",
    "judge": "judge",
    "reward": "reward",
    "kl": "KL",
    "length": "tokens",
    "distinct_2": "distinct-2",
}
"""Metrics of `lit-rlhf test` that the table shows, where a run has them, and what it calls them."""

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t for 95 %, two-sided, with 1 to 15 degrees of freedom; 1.96 is close enough beyond."""

Results = dict[str, list[dict[str, Any]]]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval of the mean over seeds (Student's t), NaN for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 1.96
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def write(folder: Path, results: Results, num_seeds: int) -> Path:
    """Write `table.md`, `table.csv` and, where matplotlib is installed, the pictures; return the first."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {
        n: title for n, title in COLUMNS.items() if any(n in r["metrics"] for rows in results.values() for r in rows)
    }
    lines = ["| method | seeds | " + " | ".join(shown.values()) + " |", "|---" * (len(shown) + 2) + "|"]
    records: list[dict[str, Any]] = []
    for name, rows in results.items():
        record: dict[str, Any] = {"method": name, "seeds": len(rows)}
        cells = []
        for metric in shown:
            values = [row["metrics"][metric] for row in rows if metric in row["metrics"]]
            mean, half = interval(values) if values else (math.nan, math.nan)
            record |= {metric: mean, f"{metric}_half_interval": half}
            cells.append("-" if mean != mean else f"{mean:.3g}" if half != half else f"{mean:.3g} ± {half:.2g}")
        count = f"{len(rows)}" if len(rows) == num_seeds else f"{len(rows)} of {num_seeds}"
        lines.append(f"| {name} | {count} | " + " | ".join(cells) + " |")
        records.append(record)
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    if find_spec("matplotlib") is not None:
        draw(folder / "curves.png", results)
    return folder / "table.md"


def draw(path: Path, results: Results) -> None:
    """Draw reward against updates and against seconds, and the judge's score against the KL, means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    titles = ("reward against updates", "reward against seconds", "judge against KL (over-optimisation)")
    labels = (
        ("updates", "val/reward"),
        ("seconds of training", "val/reward"),
        ("val/kl, nats a completion", "val/judge"),
    )
    for place, title, (x, y) in zip(axes, titles, labels, strict=True):
        place.set(title=title, xlabel=x, ylabel=y)
        place.grid(alpha=0.25)
    for name, rows in results.items():
        courses = [course(row["curves"]) for row in rows if row["curves"]]
        courses = [c for c in courses if c]
        if not courses:
            continue
        means = [mean_point([c[i] for c in courses]) for i in range(min(map(len, courses)))]
        _line(axes[0], name, [p["step"] for p in means], [p["reward"] for p in means])
        _line(axes[1], name, [p["seconds"] for p in means], [p["reward"] for p in means])
        _line(axes[2], name, [p["kl"] for p in means], [p["judge"] for p in means])
    if axes[0].lines:
        axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(axes: Axes, name: str, x: list[float], y: list[float]) -> None:
    axes.plot(x, y, marker="o", markersize=3, linewidth=1.5, label=name)


def course(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The validations of a run: updates and seconds before each, reward, KL and the judge's score."""
    seconds = list(accumulate(sum(v for name, v in row.items() if name.startswith("time/")) for row in rows))
    return [
        {
            "step": row["step"],
            "seconds": total,
            "reward": row["val/reward"],
            "kl": row["val/kl"],
            "judge": row.get("val/judge", math.nan),
        }
        for row, total in zip(rows, seconds, strict=True)
        if "val/reward" in row and "val/kl" in row
    ]


def mean_point(points: list[dict[str, float]]) -> dict[str, float]:
    """The mean of one validation over seeds."""
    return {name: statistics.fmean(point[name] for point in points) for name in points[0]}
