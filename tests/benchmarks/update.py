"""Measure the cost of an update of RLOO in this library, of its PPO, and of TRL's `RLOOTrainer`, on one machine.

    python tests/benchmarks/update.py --model FOLDER --shape short tldr long --samples 4
    python tests/benchmarks/update.py --model FOLDER --python TRL=OTHER/ENVIRONMENT/bin/python

Every measurement is a separate process. A round measures all contenders, so that a disturbance affects all of them.
Seconds are those of a round's median update after the first; ratios are within a round. The table also has the ratios
expected from counts (of tokens that pass through the models, and of multiplications) and the lower bound of the
arithmetic on this machine. Memory is the peak of the process, also without weights, gradients, optimizer and
reference, which all contenders hold. TRL must be installed if it is measured. Table and picture keep earlier results in
`--out` for other settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, Result, Settings, measure
from limits import Limits, limits

SHAPES = {"short": (40, 32), "tldr": (448, 53), "long": (64, 256)}
"""Tokens of a prompt and of a completion."""

PHASES = ("sample", "score", "train")

Rounds = list[dict[str, Result]]
"""The output of a process, by round and contender."""


@dataclass(frozen=True)
class Case:
    """Settings, their lower bounds, and the measurements."""

    settings: Settings
    least: Limits
    rounds: Rounds

    @property
    def names(self) -> list[str]:
        """The contenders."""
        return list(self.rounds[0])

    @property
    def title(self) -> str:
        """Name of the case."""
        s = self.settings
        parts = [
            Path(s.model).name,
            f"{s.prompts} x {s.samples}",
            f"{s.prompt_tokens} + {s.completion_tokens}",
            *(["bf16"] if s.precision != "32-true" else []),
            *(["LoRA"] if s.lora else []),
            *(["natural ends"] if s.natural else []),
            *([s.accelerator] if s.accelerator != "cpu" else []),
        ]
        return ", ".join(parts)

    def replaces(self, other: Case) -> bool:
        """Whether it has the same settings as another case, up to the number of updates."""
        return dataclasses.replace(self.settings, updates=other.settings.updates) == other.settings

    def ratios(self, name: str) -> list[float]:
        """Return the seconds of a contender's update over RLOO's, by round."""
        return [median_update(r[name]) / median_update(r["RLOO"]) for r in self.rounds]

    def counted(self, name: str) -> tuple[float, float]:
        """Return the ratios expected if every token costs the same, and if every multiplication does."""
        tokens = counted(self.settings, self.rounds)
        multiplications = counted(self.settings, self.rounds, self.least.layers, self.least.head)
        return tokens[name] / tokens["RLOO"], multiplications[name] / multiplications["RLOO"]


def counted(settings: Settings, rounds: Rounds, layers: int = 1, head: int = 0) -> dict[str, float]:
    """Count the work per completion, by contender: `layers` per token of a pass, and `head` per completion token.

    RLOO passes over the completion and its share of the prompt in sampling, for the reference, and three times in
    training (twice with LoRA, since most weights have no gradient). PPO's critic, which has no output layer, adds a
    pass for its values and those of its training. TRL scores its samples once more, computes the prompt with every
    completion, and pads each to the longest. Attention is not counted.
    """
    updates = [lengths for r in rounds for lengths in r["RLOO"]["lengths"]]
    mean = statistics.fmean(length for lengths in updates for length in lengths)
    longest = statistics.fmean(max(lengths) for lengths in updates)
    shared = layers * (settings.prompt_tokens / settings.samples + mean)
    padded = layers * (settings.prompt_tokens + longest) + head * longest
    training = 2 if settings.lora else 3
    rloo = (2 + training) * (shared + head * mean)
    return {"RLOO": rloo, "PPO": rloo + (1 + training) * shared, "TRL": (3 + training) * padded}


def median_update(result: Result) -> float:
    """Return the seconds of the median update after the first."""
    return statistics.median(result["seconds"][1:])


def spread(values: list[float], digits: int = 2) -> str:
    """Format the median, and in brackets the range."""
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} - {high})"


HEAD = [
    "| model, prompts x completions, tokens | | s / update | of RLOO's | counted: tokens | multiplications "
    "| peak memory (MiB) | peak minus weights, gradients, optimizer, reference |",
    "|---|---|---|---|---|---|---|---|",
]


def row(case: Case, name: str) -> str:
    """Format a line of the table."""
    peaks = [r[name]["peak_mib"] for r in case.rounds]
    cells = [
        case.title,
        name,
        spread([median_update(r[name]) for r in case.rounds]),
        spread(case.ratios(name)),
        *(f"{count:.2f}" for count in case.counted(name)),
        spread(peaks, 0),
        "-" if name == "PPO" else f"{statistics.median(peaks) - case.least.held_mib:.0f}",  # it also holds a critic
    ]
    return "| " + " | ".join(cells) + " |"


def phases(rounds: Rounds) -> dict[str, float]:
    """Return the seconds of a median update of RLOO by phase."""
    seen = [update for r in rounds for update in r["RLOO"]["phases"][1:]]
    return {name: statistics.median(update[f"time/{name}"] for update in seen) for name in PHASES}


def phase_summary(case: Case) -> str:
    """Format the seconds of RLOO by phase, with their lower bounds."""
    took, least = phases(case.rounds), case.least
    at_best = {
        "sample": f", at best {least.sample:.2f} ({least.sample / took['sample']:.0%})",
        "train": f", at best {least.train:.2f} ({least.train / took['train']:.0%})",
    }
    if case.settings.natural:
        at_best = {}
    return f"- {case.title}: " + "; ".join(f"{name} {took[name]:.2f} s{at_best.get(name, '')}" for name in PHASES)


def draw(path: Path, cases: list[Case]) -> None:
    """Draw measured and counted ratios, one bar per case and contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(2 + 1.3 * len(cases), 4), layout="constrained")
    names = [name for name in CONTENDERS if any(name in case.names for case in cases)]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        axes.bar([0], [0], color=f"C{i}", label=name)
        for j, case in enumerate(cases):
            if name in case.names:
                middle, ratios = statistics.median(case.ratios(name)), case.ratios(name)
                error = [[middle - min(ratios)], [max(ratios) - middle]]
                x = j + (i - (len(names) - 1) / 2) * width
                axes.bar(x, middle, width, color=f"C{i}", yerr=error, capsize=2)
                axes.plot([x - width / 2, x + width / 2], [case.counted(name)[0]] * 2, color="black")
    axes.plot([], [], color="black", label="counted")
    axes.set_xticks(range(len(cases)), [case.title.replace(", ", "\n") for case in cases], fontsize=8)
    axes.set_ylabel("seconds an update, RLOO = 1")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def read(path: Path) -> list[Case]:
    """Read the results of earlier calls."""
    kept: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return [Case(Settings(**c["settings"]), Limits(**c["limits"]), c["rounds"]) for c in kept]


def write(out: Path, cases: list[Case]) -> None:
    """Write the table and its data."""
    lines = [*HEAD, *(row(case, name) for case in cases for name in case.names), "", *map(phase_summary, cases)]
    (out / "update.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kept = [
        {"settings": dataclasses.asdict(c.settings), "limits": dataclasses.asdict(c.least), "rounds": c.rounds}
        for c in cases
    ]
    (out / "update.json").write_text(json.dumps(kept), encoding="utf-8")


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
    parser.add_argument("--natural", action="store_true", help="let completions end with EOS")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--python", nargs="*", default=[], metavar="NAME=INTERPRETER", help="interpreter of a contender"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/update"))
    args = parser.parse_args()
    if args.updates < 2 or args.rounds < 1:
        parser.error(f"--updates {args.updates} must be 2 or more, since the first is left out, and --rounds 1 or more")
    pythons = dict(pair.split("=", 1) for pair in args.python)
    names = ["RLOO", *[name for name in args.contenders if name != "RLOO"]]
    args.out.mkdir(parents=True, exist_ok=True)
    cases = read(args.out / "update.json")
    for shape, samples in [(shape, samples) for shape in args.shape for samples in args.samples]:
        settings = Settings(
            args.model, args.prompts, samples, *SHAPES[shape], args.natural, args.precision, args.lora, args.updates,
            args.accelerator,
        )  # fmt: skip
        tried, rounds = [], []
        for _ in range(args.rounds):
            tried.append(limits(settings))
            rounds.append({name: measure(name, settings, pythons.get(name, sys.executable)) for name in names})
        least = min(tried, key=lambda limit: limit.train + limit.sample)  # the machine undisturbed
        case = Case(settings, least, rounds)
        cases = [*(other for other in cases if not case.replaces(other)), case]
        machine = f"matrix products {least.flops / 1e9:.0f} GFLOP/s, reading {least.bandwidth / 1e9:.0f} GB/s"
        print("\n".join([*(row(case, name) for name in names), phase_summary(case), machine]), flush=True)
        write(args.out, cases)
    draw(args.out / "update.png", cases)


if __name__ == "__main__":
    main()
