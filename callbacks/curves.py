"""Training curves, drawn into one image."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.callbacks.utils import is_fast_dev_run, run_folder, scalar_metrics, survive_full_disk, validated_in_fit
from lit_rlhf.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = dict[str, list[tuple[int, float]]]

PANELS = {
    "reward": ["reward", "judge"],
    "win rate": ["win_rate"],
    "KL to the reference (nats per completion)": ["kl"],
    "completion length (tokens)": ["completion_length", "length"],
    "entropy (nats per token)": ["entropy"],
    "distinct bigrams": ["distinct_2"],
    "accuracy": ["accuracy"],
    "loss": ["loss"],
}
MAX_POINTS = 1000
"""Points of a curve; a longer one keeps every second, fourth, ... so that the checkpoints stay small."""
COLOURS = {"train": "#4878a8", "val": "#d1662f", "second": "#5a9a57"}


class Curves(Callback):
    """Draw `curves.png` in the run's folder after validations and at the end of `fit`, if matplotlib is installed.

    Training values are drawn pale with their moving mean, validation values as points. A resumed run continues its
    curves.

    Args:
        every_n_seconds: Minimum time between two drawings; each takes one or two seconds.

    Raises:
        ValueError: If `every_n_seconds` is below 0.
    """

    def __init__(self, every_n_seconds: float = 60.0) -> None:
        if not every_n_seconds >= 0:
            raise InputError(f"every_n_seconds={every_n_seconds} must be at least 0")
        self.every_n_seconds = every_n_seconds
        self.history: History = {}
        self.seen: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the output file and check that matplotlib is installed."""
        self._path = run_folder(trainer) / "curves.png"
        self._enabled = trainer.is_global_zero and not is_fast_dev_run(trainer) and find_spec("matplotlib") is not None
        self._drawn = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the metrics of a new rollout."""
        if batch_idx % getattr(pl_module, "steps_per_rollout", 1) == 0:
            self._record(trainer, "train")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of a validation, and draw if a drawing is due."""
        if validated_in_fit(trainer):
            self._record(trainer, "val")
            if self._enabled and time.monotonic() - self._drawn >= self.every_n_seconds:
                with survive_full_disk(self._path.name):
                    draw(self.history, self._path)
                self._drawn = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the whole run, including a validation that the module runs at the end of training."""
        if self._enabled:
            with survive_full_disk(self._path.name):
                draw(self.history, self._path)

    def state_dict(self) -> dict[str, Any]:
        """Return the curves so far."""
        history = {name: list(points) for name, points in self.history.items()}
        return {"history": history, "seen": dict(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves of the resumed run."""
        self.history = {
            name: [(step, value) for step, value in points] for name, points in state_dict["history"].items()
        }
        self.seen = dict(state_dict["seen"])

    def _record(self, trainer: Trainer, split: str) -> None:
        names = {f"{split}/{name}" for panel in PANELS.values() for name in panel}
        for name, value in scalar_metrics(trainer, f"{split}/").items():
            if name in names and value == value:  # not NaN
                self._add(name, trainer.global_step, value)

    def _add(self, name: str, step: int, value: float) -> None:
        points, count = self.history.setdefault(name, []), self.seen.get(name, 0)
        stride = 1
        while count // stride >= MAX_POINTS:
            stride *= 2
        if stride > 1 and count == stride // 2 * MAX_POINTS:  # it has just doubled
            del points[1::2]
        if count % stride == 0:
            points.append((step, value))
        self.seen[name] = count + 1


def draw(history: History, path: Path) -> None:
    """Draw one panel for each quantity in `history`; write no file if there is none."""
    from matplotlib.figure import Figure  # optional dependency; without pyplot's global state
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = {
        title: [n for n in names if any(f"{s}/{n}" in history for s in ("train", "val"))]
        for title, names in PANELS.items()
    }
    panels = {title: names for title, names in panels.items() if names}
    if "reward" in panels:
        panels.pop("loss", None)  # a policy-gradient loss does not show progress
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    for i, (title, names) in enumerate(panels.items(), start=1):
        _panel(figure.add_subplot(rows, columns, i), title, names, history)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    figure.savefig(partial, dpi=130)
    os.replace(partial, path)


def _panel(axes: Axes, title: str, names: list[str], history: History) -> None:
    for i, name in enumerate(names):
        if train := history.get(f"train/{name}"):
            steps, values = zip(*train, strict=True)
            axes.plot(steps, values, color=COLOURS["train"], alpha=0.3, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=COLOURS["train"], linewidth=1.8, label=f"train/{name}")
        if val := history.get(f"val/{name}"):
            colour = COLOURS["second" if i and f"val/{names[0]}" in history else "val"]
            axes.plot(*zip(*val, strict=True), "o-", color=colour, markersize=4, linewidth=1.4, label=f"val/{name}")
    if "win_rate" in names:
        axes.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("optimizer steps", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Return the moving mean over a window of a twentieth of all values."""
    window = max(1, len(values) // 20)
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
