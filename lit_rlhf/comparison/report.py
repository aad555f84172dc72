"""What a comparison leaves: tables of means with their intervals, and pictures of the courses."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = {
    "win_rate": "win rate",
    "undecided": "undecided",
    "position_bias": "position bias",
    "judge": "judge",
    "reward": "reward",
    "return": "return",
    "reward_variance": "reward variance",
    "kl": "KL",
    "length": "tokens",
    "perplexity": "perplexity",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
}
"""Metrics of `lit-rlhf test` that the table shows, where a run has them, and what it calls them."""

IF_ANY = ("undecided", "position_bias")
"""Those of them that are shown only where they are not 0 everywhere."""

COST_COLUMNS = {"seconds": "s / update", "peak_mib": "peak memory (MiB)"}
"""What is shown of a method's cost: medians, with the range of the rounds."""

DIFFERENCES = ("win_rate", "judge", "reward", "return")
"""Metrics whose difference is shown for pairs of methods."""

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t for 95 %, two-sided, with 1 to 15 degrees of freedom."""

ROUNDING = 1e-5
"""What is less is rounding, such as the KL of a policy to itself."""

Results = dict[str, list[dict[str, Any]]]
"""By method, what each seed left."""


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval of the mean over seeds (Student's t); NaN for one value, or an infinite one."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean, math.nan
    return mean, student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def student_t(freedom: int) -> float:
    """Student's t for 95 %, two-sided; beyond the table by Fisher's expansion, which is right to 0.001."""
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def write(
    folder: Path,
    results: Results,
    costs: Results,
    num_seeds: int,
    pairs: Sequence[tuple[str, str]],
    completions: int,
    rounds: int = 0,
) -> Path:
    """Write `table.md`, `table.csv` and, where matplotlib is installed, the pictures; return the first.

    Args:
        folder: Where to.
        results: What each cell left.
        costs: What each measurement of a cost left.
        num_seeds: How many cells of a method there should be.
        pairs: Methods whose difference is to be shown.
        completions: Completions an update.
        rounds: How many measurements of a method's cost there should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: title for name, title in COLUMNS.items() if _any_has(results, name)}
    shown_costs = {name: title for name, title in COST_COLUMNS.items() if _any_has(costs, name)}
    lines = _head(["method", "seeds", *shown.values(), *shown_costs.values()])
    records: list[dict[str, Any]] = []
    for name, rows in results.items():
        record: dict[str, Any] = {"method": name, "seeds": len(rows)}
        cells = [name, f"{len(rows)}" if len(rows) == num_seeds else f"{len(rows)} of {num_seeds}"]
        for metric in shown:
            values = _values(rows, metric)
            mean, half = interval(values) if values else (math.nan, math.nan)
            record |= {metric: mean, f"{metric}_half_interval": half}
            cells.append(_number(mean, half) + _part(values, rows))
        for metric in shown_costs:
            values = _values(costs.get(name, []), metric)
            record[metric] = statistics.median(values) if values else math.nan
            median, low, high = (_plain(value) for value in (record[metric], *_range(values)))
            text = f"{median} ({low} - {high})" if values else "-"
            cells.append(f"{text}, {len(values)} of {rounds}" if name in costs and len(values) < rounds else text)
        lines.append(_row(cells))
        records.append(record)
    if pairs:
        lines += ["", *_differences(results, pairs)]
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    if find_spec("matplotlib") is not None:
        draw(folder / "curves.png", results, completions, costs)
    return folder / "table.md"


def add_best_rates(table: Path, results: Results) -> None:
    """Add to a table of a sweep which learning rate gives each method the best mean return on held-out prompts.

    A rate at which a seed failed is none of the best, however lucky the others were.
    """
    best: dict[str, tuple[int, float, str]] = {}
    for name, rows in results.items():
        method, _, rate = name.rpartition(", lr ")
        if values := _values(rows, "return"):
            found = (len(values), statistics.fmean(values), rate)
            best[method] = max(best.get(method, found), found)
    lines = [_row([method, rate, f"{value:.3g}"]) for method, (_, value, rate) in best.items()]
    with table.open("a", encoding="utf-8") as file:
        file.write("\n".join(["", *_head(["method", "best rate", "return"]), *lines]) + "\n")


def _differences(results: Results, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The mean difference of two methods over the seeds that both have, with its interval."""
    shown = {name: COLUMNS[name] for name in DIFFERENCES if _any_has(results, name)}
    lines = _head(["difference", "seeds", *shown.values()])
    for first, second in pairs:
        if not {first, second} <= results.keys():
            continue
        theirs = {row["seed"]: row["metrics"] for row in results[second]}
        both = [(row["metrics"], theirs[row["seed"]]) for row in results[first] if row["seed"] in theirs]
        cells = [f"{first} - {second}", f"{len(both)}"]
        for metric in shown:
            gaps = [a[metric] - b[metric] for a, b in both if metric in a and metric in b]
            cells.append(_number(*interval(gaps)) + _part(gaps, both) if gaps else "-")
        lines.append(_row(cells))
    return lines


def _any_has(results: Results, metric: str) -> bool:
    values = [row["metrics"][metric] for rows in results.values() for row in rows if metric in row["metrics"]]
    return any(values) if metric in IF_ANY else bool(values)


def _values(rows: list[dict[str, Any]], metric: str) -> list[float]:
    return [row["metrics"][metric] for row in rows if metric in row["metrics"]]


def _part(values: list[float], rows: Sequence[Any]) -> str:
    """How many of the rows have a value, where some have and some have not."""
    return f", {len(values)} of {len(rows)}" if 0 < len(values) < len(rows) else ""


def _number(mean: float, half: float) -> str:
    """A mean with its interval, to two digits of the interval and three of the mean."""
    if mean != mean or half != half:
        return "-" if mean != mean else f"{mean:.3g}"
    size = max(abs(mean), half)
    if size < ROUNDING:
        return "0 ± 0"
    places = min(2 - _magnitude(size), 1 - _magnitude(half)) if half > 0 else 2 - _magnitude(size)
    places = max(places, 0)
    return f"{round(mean, places) + 0.0:.{places}f} ± {half:.{places}f}"


def _plain(value: float) -> str:
    """Three digits, without an exponent for what is large."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _range(values: list[float]) -> tuple[float, float]:
    return min(values, default=math.nan), max(values, default=math.nan)


def _magnitude(value: float) -> int:
    return math.floor(math.log10(value))


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(titles: list[str]) -> list[str]:
    return [_row(titles), "|---" * len(titles) + "|"]


def draw(path: Path, results: Results, completions: int, costs: Results | None = None) -> None:
    """Draw reward against completions and against seconds, and the judge's score against the KL.

    Seconds are updates times what one takes with nothing beside it, where that was measured, else those of the runs.

    Lines are means over the seeds at each validation. Of a method whose validations write nothing, a star shows where
    the test found it at the end; of one that is not trained, a dashed line shows it for scale.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    titles = ("reward against completions", "reward against seconds", "judge against KL (over-optimisation)")
    unit = "completions sampled" if completions > 1 else "updates"
    labels = (
        (unit, "reward, greedy, held-out prompts"),
        ("seconds of training", "reward, greedy, held-out prompts"),
        ("KL to the reference, nats a completion", "judge's mean score (or win rate)"),
    )
    for place, title, (x, y) in zip(axes, titles, labels, strict=True):
        place.set(title=title, xlabel=x, ylabel=y)
        place.grid(alpha=0.25)
    seconds = {name: statistics.median(_values(rows, "seconds")) for name, rows in (costs or {}).items() if rows}
    colours = plt.get_cmap("tab10" if len(results) <= 10 else "tab20")
    for i, (name, rows) in enumerate(results.items()):
        style: dict[str, Any] = {"color": colours(i % colours.N), "label": name}
        line = style | {"linestyle": ("-", ":")[i // colours.N % 2]}  # more methods than colours
        courses = [c for c in (validation_curve(row["curves"]) for row in rows) if c]
        if courses:
            means = mean_validation_curve(courses)
            spent = [p["step"] * seconds[name] if name in seconds else p["seconds"] for p in means]
            _line(axes[0], [p["step"] * completions for p in means], [p["reward"] for p in means], line)
            _line(axes[1], spent, [p["reward"] for p in means], line)
            _line(axes[2], [p["kl"] for p in means], [p["judge"] for p in means], line)
        elif _values(rows, "reward"):
            point = mean_point([end(row) for row in rows])
            took = point["step"] * seconds[name] if name in seconds else point["seconds"]
            for place, at in ((axes[0], point["step"] * completions), (axes[1], took)):
                if point["step"]:
                    _star(place, at, point["reward"], style)
                else:
                    place.axhline(point["reward"], linestyle="--", linewidth=1, **style)
            _star(axes[2], point["kl"], point["judge"], style)
    if handles := axes[2].get_legend_handles_labels()[0]:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 10), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(axes: Axes, x: list[float], y: list[float], style: dict[str, Any]) -> None:
    axes.plot(x, y, marker="o", markersize=3, linewidth=1.5, **style)


def _star(axes: Axes, x: float, y: float, style: dict[str, Any]) -> None:
    axes.plot([x], [y], marker="*", markersize=12, linestyle="none", **style)


def end(result: dict[str, Any]) -> dict[str, float]:
    """Updates and seconds of a whole run, 0 where nothing is trained, and what the test found."""
    updates, metrics = trained(result["curves"]), result["metrics"]
    step, seconds = updates[-1] if updates else (0.0, 0.0)
    judge = metrics.get("judge", metrics.get("win_rate", math.nan))
    found = {name: metrics.get(name, math.nan) for name in ("reward", "kl")}
    return {"step": step, "seconds": seconds, "judge": judge, **found}


def trained(rows: list[dict[str, float]]) -> list[tuple[float, float]]:
    """Updates so far and seconds so far, for each row of `metrics.csv` that tells them: Lightning counts from 0."""
    return [(row["step"] + 1, row["time/total"]) for row in rows if "time/total" in row]


def validation_curve(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The validations of a run: updates and seconds before each, reward, KL and the judge's score."""
    points, step, seconds = [], 0.0, 0.0
    for row in rows:
        if told := trained([row]):
            step, seconds = told[0]
        if "val/reward" in row and "val/kl" in row:
            judge = row.get("val/judge", row.get("val/win_rate", math.nan))
            points.append(
                {"step": step, "seconds": seconds, "reward": row["val/reward"], "kl": row["val/kl"], "judge": judge}
            )
    return points


def mean_validation_curve(courses: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The mean over seeds of each validation that all of them have."""
    by_step = [{point["step"]: point for point in points} for points in courses]
    shared = [step for step in by_step[0] if all(step in points for points in by_step)]
    return [mean_point([points[step] for points in by_step]) for step in shared]


def mean_point(points: list[dict[str, float]]) -> dict[str, float]:
    """The mean of one validation over seeds."""
    return {name: statistics.fmean(point[name] for point in points) for name in points[0]}
