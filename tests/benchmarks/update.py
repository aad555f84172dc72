"""What an update of RLOO costs: this library, its PPO, and TRL's `RLOOTrainer`, on the same machine.

    python tests/benchmarks/update.py --model FOLDER --shape short tldr long --samples 4
    python tests/benchmarks/update.py --model FOLDER --python TRL=OTHER/ENVIRONMENT/bin/python

Every measurement is a process of its own, and a round goes through all contenders, so that what disturbs one disturbs
all. Seconds are those of a round's median update, the first left out; ratios are those of a round. Beside them stands
how many tokens each passes through models of the policy's size, and what machine and arithmetic allow at best. Memory
is the peak of the process, and how much of that is beyond weights, gradients, optimizer and reference, which all must
hold. TRL must be installed, where it is asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, Result, Settings, measure
from limits import Limits, limits

SHAPES = {"short": (40, 32), "tldr": (448, 53), "long": (64, 256)}
"""Tokens of a prompt and of a completion."""

PHASES = ("sample", "score", "train")

Rounds = list[dict[str, Result]]
"""By round and contender, what a process said."""


def counted(settings: Settings, rounds: Rounds) -> dict[str, float]:
    """Tokens that a completion costs each contender: its own and its share of the prompt, times the passes over them.

    RLOO passes over them in sampling, for the reference, and three times in training; PPO's critic adds a pass for its
    values and three in training. TRL scores what it has sampled once more, computes the prompt with every completion,
    and each to the length of the longest.
    """
    updates = [lengths for r in rounds for lengths in r["RLOO"]["lengths"]]
    mean = statistics.fmean(length for lengths in updates for length in lengths)
    longest = statistics.fmean(max(lengths) for lengths in updates)
    shared = settings.prompt_tokens / settings.samples + mean
    return {"RLOO": 5 * shared, "PPO": 9 * shared, "TRL": 6 * (settings.prompt_tokens + longest)}


def median_update(result: Result) -> float:
    """Seconds of the median update after the first."""
    return statistics.median(result["seconds"][1:])


def spread(values: list[float], digits: int = 2) -> str:
    """The median, and in brackets the range."""
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} - {high})"


HEAD = [
    "| shape | | s / update | of RLOO's | counted | peak memory (MiB) | of that beyond what all hold |",
    "|---|---|---|---|---|---|---|",
]


def row(title: str, settings: Settings, name: str, rounds: Rounds, least: Limits) -> str:
    """A line of the table."""
    tokens = counted(settings, rounds)
    peaks = [r[name]["peak_mib"] for r in rounds]
    cells = [
        title,
        name,
        spread([median_update(r[name]) for r in rounds]),
        spread([median_update(r[name]) / median_update(r["RLOO"]) for r in rounds]),
        f"{tokens[name] / tokens['RLOO']:.2f}",
        spread(peaks, 0),
        "-" if name == "PPO" else f"{statistics.median(peaks) - least.held_mib:.0f}",  # a critic more to hold
    ]
    return "| " + " | ".join(cells) + " |"


def phases(rounds: Rounds) -> dict[str, float]:
    """Seconds of a settled update of RLOO by phase."""
    seen = [update for r in rounds for update in r["RLOO"]["phases"][1:]]
    return {name: statistics.median(update[f"time/{name}"] for update in seen) for name in PHASES}


def told(title: str, rounds: Rounds, least: Limits, full: bool) -> str:
    """Where the seconds go, and what is the least they can be."""
    took = phases(rounds)
    at_best = {
        "sample": f", at best {least.sample:.2f} ({least.sample / took['sample']:.0%})",
        "train": f", at best {least.train:.2f} ({least.train / took['train']:.0%})",
    }
    parts = [f"{name} {took[name]:.2f} s{at_best.get(name, '') if full else ''}" for name in PHASES]
    return f"- {title}: " + "; ".join(parts)


def draw(path: Path, measured: list[tuple[str, Settings, Rounds]], names: list[str]) -> None:
    """Draw measured ratios over counted ones, a bar a shape and contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(2 + 1.3 * len(measured), 4), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for j, (_, settings, rounds) in enumerate(measured):
            ratios = [median_update(r[name]) / median_update(r["RLOO"]) for r in rounds]
            middle = statistics.median(ratios)
            error = [[middle - min(ratios)], [max(ratios) - middle]]
            x, tokens = j + (i - (len(names) - 1) / 2) * width, counted(settings, rounds)
            axes.bar(x, middle, width, color=f"C{i}", label=name if j == 0 else None, yerr=error, capsize=2)
            axes.plot([x - width / 2, x + width / 2], [tokens[name] / tokens["RLOO"]] * 2, color="black")
    axes.plot([], [], color="black", label="counted")
    axes.set_xticks(range(len(measured)), [title.replace(", ", "\n") for title, _, _ in measured], fontsize=8)
    axes.set_ylabel("seconds an update, RLOO = 1")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["short"])
    parser.add_argument("--samples", nargs="+", type=int, default=[4], help="completions of each prompt")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a rollout")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all weights")
    parser.add_argument("--natural", action="store_true", help="let completions end by themselves")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--python", nargs="*", default=[], metavar="NAME=INTERPRETER", help="where a contender lives")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/update"))
    args = parser.parse_args()
    if args.updates < 2 or args.rounds < 1:
        parser.error(f"--updates {args.updates} must be 2 or more, since the first is left out, and --rounds 1 or more")
    pythons = dict(pair.split("=", 1) for pair in args.python)
    names = ["RLOO", *[name for name in args.contenders if name != "RLOO"]]
    args.out.mkdir(parents=True, exist_ok=True)
    lines, notes = list(HEAD), []
    measured: list[tuple[str, Settings, Rounds]] = []
    kept: list[dict[str, Any]] = []
    for shape, samples in [(shape, samples) for shape in args.shape for samples in args.samples]:
        p, t = SHAPES[shape]
        settings = Settings(
            args.model, args.prompts, samples, p, t, args.natural, args.precision, args.lora, args.updates,
            args.accelerator,
        )  # fmt: skip
        title, least = f"p = {p}, t = {t}, k = {samples}", limits(settings)
        rounds = [
            {name: measure(name, settings, pythons.get(name, sys.executable)) for name in names}
            for _ in range(args.rounds)
        ]
        lines += [row(title, settings, name, rounds, least) for name in names]
        notes.append(told(title, rounds, least, full=not args.natural))
        measured.append((title, settings, rounds))
        kept.append({"settings": dataclasses.asdict(settings), "limits": dataclasses.asdict(least), "rounds": rounds})
        machine = f"matrix products {least.flops / 1e9:.0f} GFLOP/s, reading {least.bandwidth / 1e9:.0f} GB/s"
        print("\n".join([*lines[-len(names) :], notes[-1], machine]), flush=True)
        (args.out / "update.md").write_text("\n".join([*lines, "", *notes]) + "\n", encoding="utf-8")
        (args.out / "update.json").write_text(json.dumps(kept), encoding="utf-8")
    draw(args.out / "update.png", measured, names)


if __name__ == "__main__":
    main()
