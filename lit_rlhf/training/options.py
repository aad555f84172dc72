"""Options of the optimizer and its schedule in a resumed run: those that were changed take effect.

A checkpoint restores every option of the optimizer and the schedule. So it also keeps those that the run was started
with: what differs from them in the resumed run was changed by its user.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_rlhf.errors import InputError


class OptimizationOptions:
    """The options that an optimizer and its schedule were made with.

    Args:
        optimizer: The new optimizer, with a schedule after its construction.
        scheduler: The schedule.
        rates: Learning rate of each parameter group before the schedule was made.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None, rates: list[Any]) -> None:
        self.optimizer, self.scheduler, self.rates = optimizer, scheduler, rates
        self.groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.schedule = copy.deepcopy(scheduler.state_dict()) if scheduler is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the options as plain data for a checkpoint."""
        rates = [float(rate) for rate in self.rates]
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        return {
            "optimizer": type(self.optimizer).__name__,
            "groups": [
                {**as_numbers(group), "lr": rate, "size": size}
                for group, rate, size in zip(self.groups, rates, sizes, strict=True)
            ],
            "scheduler": type(self.scheduler).__name__ if self.scheduler is not None else "",
            "schedule": as_numbers(self.schedule),
        }

    def check(self, saved: Mapping[str, Any]) -> None:
        """Check that the optimizer can load the state of the one in a checkpoint.

        Args:
            saved: Options of the run that wrote the checkpoint.

        Raises:
            ValueError: If it is another optimizer, or of other parameters.
        """
        now = self.state_dict()
        before, after = ([(g.get("name"), g["size"]) for g in options["groups"]] for options in (saved, now))
        if saved["optimizer"] != now["optimizer"]:
            raise InputError(
                f"the checkpoint has the state of {saved['optimizer']}, which {now['optimizer']} can't continue: "
                "resume with the same optimizer, or start a new run from the exported policy"
            )
        if before != after:
            raise InputError(
                f"the checkpoint's optimizer has the parameter groups {before} (name, parameters), and this run's has "
                f"{after}: resume with the same method, critic, `lora` and trainable parameters"
            )

    def changes(self, saved: Mapping[str, Any]) -> list[str]:
        """Return the names of the options that differ from those in a checkpoint."""
        now = self.state_dict()
        groups = zip(saved["groups"], now["groups"], strict=True)
        names = [key for before, after in groups for key in after if before.get(key) != after[key]]
        names += ["lr_scheduler"] if now["scheduler"] != saved["scheduler"] else []
        if now["scheduler"] == saved["scheduler"]:
            derived = {"base_lrs", "_last_lr"}
            state = now["schedule"].items()
            names += [f"lr_scheduler.{k}" for k, v in state if k not in derived and saved["schedule"].get(k) != v]
        return list(dict.fromkeys(names))

    def apply_changes(self, saved: Mapping[str, Any], updates: int) -> None:
        """Set the options that were changed, after the checkpoint has been restored.

        With a changed learning rate or schedule, the rate is that of the new schedule after as many updates.

        Args:
            saved: Options of the run that wrote the checkpoint.
            updates: Number of updates so far.
        """
        names = self.changes(saved)
        if not names:
            return
        scheduled = any(name in ("lr", "initial_lr") or name.startswith("lr_scheduler") for name in names)
        for group, options in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.update(options if scheduled else {n: v for n, v in options.items() if n in names})
        if scheduled and self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(self.schedule))
            with warnings.catch_warnings(action="ignore"):  # about steps before the first update
                for _ in range(updates):
                    self.scheduler.step()
        rank_zero_info(f"changed since the checkpoint was written: {', '.join(n for n in names if n != 'initial_lr')}")


def as_numbers(value: Any) -> Any:
    """Return numbers, strings, lists and dicts; tensors as numbers, other objects as None."""
    if isinstance(value, Mapping):
        return {str(k): as_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_numbers(v) for v in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, bool | int | float | str) else None
