"""Sample logging: prompts and completions in the terminal, the loggers and a JSON lines file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich import get_console
from rich.table import Table
from rich.text import Text

from lit_rlhf.callbacks.utils import (
    RolloutCallback,
    completion_kl,
    format_number,
    is_fast_dev_run,
    run_folder,
    survive_full_disk,
)
from lit_rlhf.errors import InputError, counted
from lit_rlhf.types import Rollout

COLUMNS = ["step", "epoch", "split", "prompt", "completion", "reward", "component_rewards", "kl", "length", "finished"]


class SampleLogger(RolloutCallback):
    """Log prompts and completions with their reward, its components and the KL in nats.

    They go to the terminal, to the loggers that take tables or text (Weights & Biases, TensorBoard, MLflow, Comet, and
    any with a `log_table`), and to `samples.jsonl` in the run's folder: one JSON object per line with the keys of
    `COLUMNS`. A number that is missing or not finite is null. `split` is "train" for sampled completions and "val" for
    the greedy ones on held-out prompts. Every validation writes the latter to the file and the loggers. Only the first
    rank logs, and only completions that it sampled.

    Args:
        every_n_rollouts: Rollouts between two logged ones; the first is always logged.
        num_samples: Number of completions to log, of different prompts if there are enough.
        to_terminal: Whether to print the sampled ones as a table.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, every_n_rollouts: int = 10, num_samples: int = 3, to_terminal: bool = True) -> None:
        if every_n_rollouts < 1 or num_samples < 1:
            raise InputError(
                f"every_n_rollouts={every_n_rollouts} and num_samples={num_samples} must be at least 1; "
                "remove the callback to log no samples"
            )
        self.every_n_rollouts = every_n_rollouts
        self.num_samples = num_samples
        self.to_terminal = to_terminal

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the output file."""
        self._path = run_folder(trainer) / "samples.jsonl"

    def on_rollout(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:
        """Log samples of a new rollout if they are due."""
        count = trainer.fit_loop.total_batch_idx // getattr(pl_module, "steps_per_rollout", 1)
        if count % self.every_n_rollouts or not trainer.is_global_zero:
            return
        samples = rollout_samples(rollout, pl_module.tokenizer, self.num_samples)
        rows = self._log(trainer, pl_module, "train", samples)
        if self.to_terminal:
            get_console().print(_table(rows, f"samples after {counted(trainer.global_step, 'update')}"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the completions of the held-out prompts."""
        examples = getattr(pl_module, "examples", None)
        if examples and trainer.is_global_zero and not trainer.sanity_checking:
            self._log(trainer, pl_module, "val", examples)

    def _log(
        self, trainer: Trainer, module: LightningModule, split: str, samples: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        step = getattr(module, "updates_done", trainer.global_step)  # also right for an evaluated checkpoint
        progress = {"step": step, "epoch": trainer.current_epoch, "split": split}
        rows = [jsonable({**dict.fromkeys(COLUMNS), **sample, **progress}) for sample in samples]
        for logger in trainer.loggers:
            _to_logger(logger, f"{split}/samples", rows, step)
        if not is_fast_dev_run(trainer):
            with survive_full_disk(self._path.name):
                _append(self._path, rows)
        return rows


def rollout_samples(rollout: Rollout, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Return `count` completions of a rollout as rows: the first sample of each prompt, then the second, and so on."""
    n, k = rollout.rewards.shape
    kl, lengths, rewards = completion_kl(rollout), rollout.completions.lengths, rollout.total_rewards
    return [
        {
            "prompt": _prompt(rollout, tokenizer, i),
            "completion": _completion(rollout, tokenizer, i, j),
            "reward": float(rewards[i, j]) if rollout.valid[i, j] else None,
            "component_rewards": {name: float(values[i, j]) for name, values in rollout.component_rewards.items()},
            "kl": float(kl[i, j]),
            "length": int(lengths[i, j]),
            "finished": bool(rollout.completions.finished[i, j]),
            **{name: column[i][j] for name, column in rollout.reward_extras.items()},
        }
        for i, j in [(i, j) for j in range(k) for i in range(n)][:count]
    ]


def as_text(value: Any) -> str:
    """Convert a prompt or a completion to one string: text unchanged, messages as lines of `role: content`."""
    if isinstance(value, list):
        return "\n".join(f"{message['role']}: {_content(message)}" for message in value)
    return str(value)


def _content(message: dict[str, Any]) -> Any:
    """Return the content of a message, or its tool calls if it has no content."""
    return message.get("content") or json.dumps(message.get("tool_calls") or "", default=str)


def _prompt(rollout: Rollout, tokenizer: Any, i: int) -> Any:
    prompts = rollout.prompts
    return prompts.text[i] if prompts.text else tokenizer.decode(prompts.tokens[i][prompts.mask[i]].tolist())


def _completion(rollout: Rollout, tokenizer: Any, i: int, j: int) -> Any:
    if rollout.texts:
        return rollout.texts[i][j]
    tokens, mask = rollout.completions.tokens[i, j], rollout.completions.mask[i, j]
    return tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=True)


def jsonable(value: Any) -> Any:
    """Convert a value for JSON: numbers that are not finite become null, unknown types their string."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    with path.open("a", encoding="utf-8", errors="replace") as file:
        file.write("".join(line + "\n" for line in lines))


def _short(value: Any, limit: int, end: bool = False) -> Text:
    """Truncate a text for the terminal; with `end`, keep its end (for prompts)."""
    text = as_text(value)
    cut = "…" + text[-limit:] if end else text[:limit] + "…"
    return Text(text if len(text) <= limit else cut)


def _reward(row: dict[str, Any]) -> str:
    components = row["component_rewards"] or {}
    lines = [f"{name} {format_number(value)}" for name, value in components.items()] if len(components) > 1 else []
    return "\n".join([format_number(row["reward"]), *lines])


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table("prompt", "completion", title=title, title_justify="left", show_lines=True)
    for name in ("reward", "KL", "tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        prompt, completion = _short(row["prompt"], 300, end=True), _short(row["completion"], 600)
        table.add_row(prompt, completion, Text(_reward(row)), format_number(row["kl"]), str(row["length"] or "-"))
    return table


def _to_logger(logger: Any, key: str, rows: list[dict[str, Any]], step: int) -> None:
    write = getattr(logger, "log_table", None) or getattr(logger, "log_text", None)
    if write is not None:  # Weights & Biases
        write(key=key, columns=COLUMNS, data=[[_cell(row[column]) for column in COLUMNS] for row in rows])
        return
    experiment: Any = getattr(logger, "experiment", None)
    text = "\n\n---\n\n".join(_markdown(row) for row in rows)
    if hasattr(experiment, "add_text"):  # TensorBoard
        experiment.add_text(key, text, step)
    elif hasattr(experiment, "log_text") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_text(logger.run_id, text, f"{key}/{step}.md")
    elif hasattr(experiment, "log_text"):  # Comet
        experiment.log_text(text, step=step)


def _cell(value: Any) -> Any:
    return as_text(value) if isinstance(value, list) else json.dumps(value) if isinstance(value, dict) else value


def _markdown(row: dict[str, Any]) -> str:
    components = json.dumps(row["component_rewards"])
    values = f"reward {format_number(row['reward'])}, KL {format_number(row['kl'])}, {components}"
    quoted = as_text(row["completion"]).replace("\n", "\n> ")
    return f"{as_text(row['prompt'])}\n\n> {quoted}\n\n*{values}*"
