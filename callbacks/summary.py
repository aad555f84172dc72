"""Summary of a run: what it will do, and its results."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_rlhf.callbacks.checkpoint import PolicyCheckpoint
from lit_rlhf.callbacks.growing_batch import GrowingBatch
from lit_rlhf.callbacks.samples import as_text
from lit_rlhf.callbacks.utils import format_number, run_folder, scalar_metrics, validated_in_fit
from lit_rlhf.errors import counted
from lit_rlhf.training.plan import Plan, cpu_advice

ROWS = {
    "val/reward": "reward",
    "val/judge": "judge",
    "val/win_rate": "win rate",
    "val/kl": "KL (nats per completion)",
    "val/length": "length (tokens)",
    "val/distinct_2": "distinct bigrams",
    "val/accuracy": "accuracy",
    "val/loss": "loss",
}


class Summary(Callback):
    """Print what a run will do; then metrics and completions on held-out prompts before and after, and its files.

    "Before" is the first validation of the run, also after a resume; "after" is the last one.

    Args:
        num_examples: Number of held-out prompts to show; 0 shows none.
    """

    def __init__(self, num_examples: int = 3) -> None:
        self.num_examples = num_examples
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self._advised = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the output folder."""
        self._folder = run_folder(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the run will do, and whether the CPU has room for it."""
        if not trainer.is_global_zero:
            return
        module: Any = pl_module
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        sampling = getattr(module, "sampling", None)
        plan = Plan(
            rows=(getattr(getattr(trainer, "datamodule", None), "batch_size", None) or 0) * trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            updates=trainer.estimated_stepping_batches,
            done=trainer.global_step,
            num_samples=module.num_samples if sampling else 0,
            max_new_tokens=sampling.max_new_tokens if sampling else 0,
            steps_per_rollout=getattr(module, "steps_per_rollout", 1),
            corrected=getattr(module, "uses_importance_ratio", False) or getattr(module, "corrects_updates", False),
            rounds=getattr(getattr(module, "dynamic_sampling", None), "rounds", 1),
            extra_samples=getattr(module, "extra_samples", 0),
            grows=any(isinstance(callback, GrowingBatch) for callback in callbacks),
            trained=sum(weight.numel() for weight in module.parameters() if weight.requires_grad),
            weights=sum(weight.numel() for weight in module.parameters()),
        )
        for label, text in plan.lines().items():
            get_console().print(Text(f"{label:<14}{text}"), soft_wrap=True)
        self._advise(trainer, own_load=0.0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics and completions of this validation."""
        if validated_in_fit(trainer):
            examples = [
                {"prompt": as_text(example["prompt"]), "completion": as_text(example["completion"])}
                for example in getattr(pl_module, "examples", [])[: self.num_examples]
            ]
            metrics = scalar_metrics(trainer, "val/")
            module: Any = pl_module
            judge = " ".join(module.judge.names) if "val/judge" in metrics else ""
            self.last = {"step": trainer.global_step, "metrics": metrics, "examples": examples, "judge": judge}
            self.first = self.first or copy.deepcopy(self.last)

            self._advise(trainer, own_load=torch.get_num_threads())

    def _advise(self, trainer: Trainer, own_load: float) -> None:
        if self._advised or not trainer.is_global_zero or trainer.strategy.root_device.type != "cpu":
            return
        if advice := cpu_advice(torch.get_num_threads(), own_load):
            self._advised = True
            get_console().print(Text(f"{'CPU':<14}{advice}"), soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the first and the last validation."""
        return {"first": self.first, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the first and the last validation of the resumed run."""
        self.first, self.last = state_dict["first"], state_dict["last"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        if not trainer.is_global_zero:
            return
        console = get_console()
        if self.first:
            console.print(_metrics_table(self.first, self.last))
            _print_examples(console, self.first, self.last)
        for name, path in self._files(trainer).items():
            console.print(Text(f"{name:<16}{path}"), soft_wrap=True)

    def _files(self, trainer: Trainer) -> dict[str, Any]:
        files: dict[str, Any] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PolicyCheckpoint):
                files |= {f"{name} policy": path for name, path in callback.policies.items()}
                files |= {"to resume": callback.last_path} if callback.last_path else {}
        return {**files, "run folder": self._folder}


def _metrics_table(first: dict[str, Any], last: dict[str, Any]) -> Table:
    records = [last] if first["step"] == last["step"] else [first, last]
    table = Table(title="on held-out prompts", title_justify="left")
    table.add_column("")
    for record in records:
        table.add_column(_when(record["step"]), justify="right")
    for name in _rows(last["metrics"]):
        table.add_row(_label(name, last["judge"]), *[format_number(record["metrics"].get(name)) for record in records])
    return table


def _rows(metrics: dict[str, float]) -> list[str]:
    components = [name for name in metrics if name.startswith("val/reward/")]
    known = [name for name in ROWS if name in metrics]
    return [name for row in known for name in ([row, *components] if row == "val/reward" else [row])]


def _label(name: str, judge: str) -> str:
    if judge and name in ("val/judge", "val/win_rate"):
        return f"{judge} {'reward' if name == 'val/judge' else 'win rate'}"
    return ROWS.get(name, "  " + name.removeprefix("val/reward/"))


def _when(step: int) -> str:
    return "before" if step == 0 else f"after {counted(step, 'update')}"


def _print_examples(console: Console, first: dict[str, Any], last: dict[str, Any]) -> None:
    before = {example["prompt"]: example["completion"] for example in first["examples"]}
    for example in last["examples"]:
        console.print(Text(f"\n{example['prompt']}", style="bold"))
        if first["step"] != last["step"] and example["prompt"] in before:
            console.print(Text(f"  {_when(first['step'])}: {before[example['prompt']]}", style="dim"))
        console.print(Text(f"  {_when(last['step'])}: {example['completion']}"))
    console.print()
