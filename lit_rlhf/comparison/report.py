"""Tables of a comparison: means with confidence intervals, differences, costs, best learning rates."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_rlhf.comparison.plots import draw, draw_intervals
from lit_rlhf.comparison.results import Results, confidence_interval, metric_values

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
"""Metrics of `lit-rlhf test` in the table, if any run has them, with their titles."""

IF_NONZERO = ("undecided", "position_bias")
"""Metrics that the table omits if they are 0 everywhere."""

COST_COLUMNS = {"seconds": "s / update", "peak_mib": "peak memory (MiB)"}
"""Costs of a method, with their titles: medians, with the range over the rounds."""

DIFFERENCES = ("win_rate", "judge", "reward", "return", "length")
"""Metrics in the table of differences."""

Contrasts = dict[str, tuple[list[str], list[str]]]
"""Differences by title: the mean of some arms minus that of others."""

ROUNDING = 1e-5
"""Smaller numbers are rounding errors, such as the KL of a policy to itself."""


def write(
    folder: Path,
    results: Results,
    costs: Results,
    num_seeds: int,
    contrasts: Contrasts,
    completions: dict[str, float],
    rounds: int = 0,
) -> Path:
    """Write `table.md`, `table.csv` and `runs.csv`, and return the first's path.

    With matplotlib installed `curves.png` and `intervals.png` are written too.

    Args:
        folder: Output folder.
        results: Results of each arm.
        costs: Cost measurements of each arm.
        num_seeds: Planned number of runs per arm.
        contrasts: Differences to show.
        completions: Completions per update of each arm.
        rounds: Planned number of cost measurements per arm.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines, records = _summary(results, costs, num_seeds, rounds)
    if contrasts:
        lines += ["", *_differences(results, contrasts)]
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_csv(folder / "table.csv", records)
    _write_csv(folder / "runs.csv", _runs(results))
    if find_spec("matplotlib") is not None:
        draw(folder / "curves.png", results, completions, costs)
        draw_intervals(folder / "intervals.png", results)
    return folder / "table.md"


def add_best_rates(table: Path, results: Results) -> None:
    """Append to the table of a sweep each method's learning rate with the best mean return on held-out prompts.

    A rate with fewer successful seeds never beats one with more.
    """
    best: dict[str, tuple[int, float, str]] = {}
    for name, rows in results.items():
        method, _, rate = name.rpartition(", lr ")
        if values := [value for value in metric_values(rows, "return") if math.isfinite(value)]:
            candidate = (len(values), statistics.fmean(values), rate)
            best[method] = max(best.get(method, candidate), candidate)
    lines = [_row([method, rate, f"{value:.3g}"]) for method, (_, value, rate) in best.items()]
    with table.open("a", encoding="utf-8") as file:
        file.write("\n".join(["", *_head(["method", "best rate", "return"]), *lines]) + "\n")


def _runs(results: Results) -> list[dict[str, Any]]:
    """Return one record per run."""
    metrics = [name for name in COLUMNS if _is_shown(results, name)]
    return [
        {"method": name, "seed": row["seed"]} | {metric: row["metrics"].get(metric, math.nan) for metric in metrics}
        for name, rows in results.items()
        for row in rows
    ]


def _write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]) if records else ["method"])
        writer.writeheader()
        writer.writerows(records)


def _summary(results: Results, costs: Results, num_seeds: int, rounds: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Return one row per arm, as Markdown lines with a head and as records."""
    metrics = {name: title for name, title in COLUMNS.items() if _is_shown(results, name)}
    cost_metrics = {name: title for name, title in COST_COLUMNS.items() if _is_shown(costs, name)}
    lines = _head(["method", "seeds", *metrics.values(), *cost_metrics.values()])
    records: list[dict[str, Any]] = []
    for name, rows in results.items():
        record: dict[str, Any] = {"method": name, "seeds": len(rows)}
        fields = [name, f"{len(rows)}" if len(rows) == num_seeds else f"{len(rows)} of {num_seeds}"]
        for metric in metrics:
            values = metric_values(rows, metric)
            mean, half = confidence_interval(values) if values else (math.nan, math.nan)
            record |= {metric: mean, f"{metric}_half_interval": half}
            fields.append(_with_interval(mean, half) + _coverage(values, rows))
        for metric in cost_metrics:
            values = metric_values(costs.get(name, []), metric)
            record[metric] = statistics.median(values) if values else math.nan
            text = f"{_plain(record[metric])} ({_plain(min(values))} - {_plain(max(values))})" if values else "-"
            fields.append(f"{text}, {len(values)} of {rounds}" if name in costs and len(values) < rounds else text)
        lines.append(_row(fields))
        records.append(record)
    return lines, records


def _differences(results: Results, contrasts: Contrasts) -> list[str]:
    """Return the mean of each difference over the seeds that all of its arms have, with its interval."""
    metrics = {name: COLUMNS[name] for name in DIFFERENCES if _is_shown(results, name)}
    lines = _head(["difference", "seeds", *metrics.values()])
    for title, (first, second) in contrasts.items():
        if not {*first, *second} <= results.keys():
            continue
        runs = {name: {row["seed"]: row["metrics"] for row in results[name]} for name in (*first, *second)}
        seeds = [seed for seed in runs[first[0]] if all(seed in by_seed for by_seed in runs.values())]
        fields = [title, f"{len(seeds)}"]
        for metric in metrics:
            complete = [seed for seed in seeds if all(metric in by_seed[seed] for by_seed in runs.values())]
            gaps = [_mean(runs, first, seed, metric) - _mean(runs, second, seed, metric) for seed in complete]
            fields.append(_with_interval(*confidence_interval(gaps)) + _coverage(gaps, seeds) if gaps else "-")
        lines.append(_row(fields))
    return lines


def _mean(runs: dict[str, dict[int, dict[str, float]]], arms: list[str], seed: int, metric: str) -> float:
    return statistics.fmean(runs[name][seed][metric] for name in arms)


def _is_shown(results: Results, metric: str) -> bool:
    values = [value for rows in results.values() for value in metric_values(rows, metric)]
    return any(values) if metric in IF_NONZERO else bool(values)


def _coverage(values: list[float], rows: Sequence[Any]) -> str:
    """Return `, 2 of 3` if only some of the rows have a value."""
    return f", {len(values)} of {len(rows)}" if 0 < len(values) < len(rows) else ""


def _with_interval(mean: float, half: float) -> str:
    """Format a mean with its interval, to two digits of the interval and three of the mean."""
    if math.isnan(mean) or math.isnan(half):
        return "-" if math.isnan(mean) else f"{mean:.3g}"
    size = max(abs(mean), half)
    if size < ROUNDING:
        return "0 ± 0"
    places = min(2 - _magnitude(size), 1 - _magnitude(half)) if half > 0 else 2 - _magnitude(size)
    places = max(places, 0)
    return f"{round(mean, places) + 0.0:.{places}f} ± {half:.{places}f}"


def _plain(value: float) -> str:
    """Format three digits, without an exponent for large numbers."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(value))


def _row(fields: list[str]) -> str:
    return "| " + " | ".join(fields) + " |"


def _head(titles: list[str]) -> list[str]:
    return [_row(titles), "|---" * len(titles) + "|"]
