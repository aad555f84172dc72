"""Measure how the cost of an update grows with prompts, samples, tokens, model and vocabulary, one at a time.

    python tests/benchmarks/growth.py

Models are small Llamas with random weights. Every point is measured in a separate process. The slope is that of a
line through the logarithms of the two largest points: 1 if the cost is proportional, less with a fixed cost, more if
the cost grows faster.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from contenders import Settings, measure

MODEL = {"hidden": 256, "layers": 4, "vocabulary": 2048}
AXES = {
    "prompts": (2, 4, 8, 16, 32),
    "samples": (2, 4, 8, 16, 32),
    "prompt_tokens": (64, 128, 256, 512, 1024),
    "completion_tokens": (16, 32, 64, 128, 256),
    "layers": (2, 4, 8, 16),
    "hidden": (128, 256, 512, 1024),
    "vocabulary": (2048, 8192, 32768, 131072),
}
"""Varied settings and their values; all others stay at `MODEL` and `BASE`."""

BASE = {"prompts": 4, "samples": 4, "prompt_tokens": 128, "completion_tokens": 32}

MAKE = """
import sys
from tiny import make_llama, make_tokenizer
hidden, layers, vocabulary, folder = *map(int, sys.argv[1:4]), sys.argv[4]
make_llama(vocabulary, hidden, layers, max_position_embeddings=4096, initializer_range=0.02).save_pretrained(folder)
make_tokenizer().save_pretrained(folder)
"""


def make_model(folder: Path, hidden: int, layers: int, vocabulary: int) -> Path:
    """Make a model with random weights in a separate process, so that this one stays small."""
    target = folder / f"{hidden}-{layers}-{vocabulary}"
    if not target.exists():
        numbers = [str(hidden), str(layers), str(vocabulary)]
        subprocess.run([sys.executable, "-c", MAKE, *numbers, str(target)], check=True, cwd=Path(__file__).parents[1])
    return target


def seconds(folder: Path, updates: int, rounds: int, **changed: int) -> list[float]:
    """Return the seconds of the median update after the first, by round."""
    model = make_model(folder, **{name: changed.get(name, value) for name, value in MODEL.items()})
    shape = {name: changed.get(name, value) for name, value in BASE.items()}
    settings = Settings(str(model), updates=updates, **shape)
    return [statistics.median(measure("RLOO", settings)["seconds"][1:]) for _ in range(rounds)]


def draw(path: Path, found: dict[str, dict[int, list[float]]]) -> None:
    """Draw seconds over each axis, with a line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = plt.figure(figsize=(3.4 * columns, 3 * rows), layout="constrained")
    for i, (axis, points) in enumerate(found.items(), start=1):
        place = figure.add_subplot(rows, columns, i)
        x, y = list(points), [statistics.median(times) for times in points.values()]
        place.loglog(x, y, marker="o", label="measured")
        place.loglog(x, [y[-1] * value / x[-1] for value in x], linestyle=":", color="black", label="proportional")
        place.set(xlabel=axis.replace("_", " "), ylabel="seconds an update")
        place.set_xticks(x, [str(value) for value in x], minor=False)
        place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.yaxis.set_major_formatter("{x:g}")
        for direction in (place.xaxis, place.yaxis):
            direction.set_minor_locator(NullLocator())
        place.grid(alpha=0.3)
        if i == 1:
            place.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/growth"))
    args = parser.parse_args()
    if args.updates < 2 or args.rounds < 1:
        parser.error(f"--updates {args.updates} must be 2 or more, since the first is left out, and --rounds 1 or more")
    args.out.mkdir(parents=True, exist_ok=True)
    lines = ["| what grows | seconds an update | slope at the end |", "|---|---|---|"]
    found: dict[str, dict[int, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for axis in args.axes:
            points = {n: seconds(Path(folder), args.updates, args.rounds, **{axis: n}) for n in AXES[axis]}
            found[axis] = points
            (a, low), (b, high) = [(n, statistics.median(times)) for n, times in points.items()][-2:]
            values = ", ".join(f"{n}: {statistics.median(times):.2f}" for n, times in points.items())
            lines.append(f"| {axis} | {values} | {math.log(high / low) / math.log(b / a):.2f} |")
            print(lines[-1], flush=True)
            (args.out / "growth.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (args.out / "growth.json").write_text(json.dumps(found), encoding="utf-8")
    draw(args.out / "growth.png", found)


if __name__ == "__main__":
    main()
