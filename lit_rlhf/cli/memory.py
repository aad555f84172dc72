"""`lit-rlhf memory`: what a run will hold on each device, before it starts."""

from __future__ import annotations

from typing import Any

import torch
from rich import get_console
from rich.table import Table
from rich.text import Text

from lit_rlhf.algorithms import Algorithm
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.data import TextData
from lit_rlhf.errors import InputError
from lit_rlhf.memory.estimate import Estimate, Setting, completions_of_a_row, estimate
from lit_rlhf.memory.passes import Shape
from lit_rlhf.training.strategies import FSDP2Strategy

GIB = 2**30
USABLE = 0.9
"""Share of a device's memory that is planned with: the rest is for CUDA itself and for gaps between tensors."""


def print_memory(algorithm: Algorithm, data: TextData, options: Any) -> None:
    """Print the table and the two peaks.

    Args:
        algorithm: The algorithm, made with its options.
        data: The data module.
        options: Options of the command.

    Raises:
        ValueError: If a length is not known, or the strategy is another one.
    """
    setting = read_setting(options.trainer)
    found = estimate(algorithm, read_shape(algorithm, data, options), setting)
    console = get_console()
    console.print(table(found, setting))
    peaks = {"sampling": found.sampling_peak, "update": found.update_peak}
    line = ", ".join(f"{name} {peak / GIB:.2f} GiB" for name, peak in peaks.items() if peak)
    console.print(Text(f"peak of each device: {line}{verdict(found, algorithm, setting, options)}"), soft_wrap=True)


def read_setting(trainer: Any) -> Setting:
    """Read how a run is placed on devices from the Trainer's options.

    Raises:
        ValueError: If the strategy is another one.
    """
    accelerator = trainer.accelerator
    cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    given = trainer.devices
    number = str(given).lstrip("-").isdigit()
    devices = len(given) if isinstance(given, list) else int(given) if number and int(given) > 0 else 0
    devices = devices or (torch.cuda.device_count() if cuda else 1) or 1
    devices *= trainer.num_nodes
    strategy = trainer.strategy
    name = "fsdp2" if isinstance(strategy, FSDP2Strategy) else strategy
    name = "ddp" if type(name).__name__ == "DDPStrategy" or str(name).startswith("ddp") else name
    if name == "auto":
        name = "ddp" if devices > 1 else "single"
    if name not in ("single", "ddp", "fsdp2"):
        raise InputError(f"--trainer.strategy {name!r}: the memory of `ddp` and `fsdp2` is known, and no other's")
    return Setting(
        precision=full_name(trainer.precision),
        accumulate=trainer.accumulate_grad_batches,
        devices=devices,
        strategy=name,
        gather=getattr(strategy, "gather", True),
        on_cpu=not cuda,
    )


def full_name(precision: Any) -> str:
    """Return the precision by its full name."""
    return {"16": "16-mixed", "bf16": "bf16-mixed"}.get(str(precision), str(precision or "32-true"))


def read_shape(algorithm: Algorithm, data: TextData, options: Any) -> Shape:
    """Return the largest batch of a step.

    Raises:
        ValueError: If a length is not known.
    """
    prompt = options.prompt_tokens or data.max_prompt_tokens
    sampled = algorithm.sampling.max_new_tokens if isinstance(algorithm, OnlineAlgorithm) else None
    completion = options.completion_tokens or sampled or data.max_completion_tokens
    for name, value in {"prompt": prompt, "completion": completion}.items():
        if not value or value < 1:
            raise InputError(f"the longest {name} is not known: give --{name}_tokens N, or --data.max_{name}_tokens N")
    return Shape(data.batch_size, completions_of_a_row(algorithm), prompt, completion)


def table(found: Estimate, setting: Setting) -> Table:
    """Return the table: what is held, when, and how much of it."""
    where = "one device" if setting.devices == 1 else f"each of {setting.devices} devices"
    made = Table(title=f"GiB on {where}", title_justify="left")
    for column in ("", "sampling", "update"):
        made.add_column(column, justify="right" if column else "left")
    for parts, sampling, update in ((found.always, 1, 1), (found.sampling, 1, 0), (found.update, 0, 1)):
        for name, held in parts.items():
            shown = f"{held / GIB:.3f}"
            made.add_row(name, shown if sampling and found.sampling else "", shown if update else "")
    made.add_section()
    sampled = f"{found.sampling_peak / GIB:.3f}" if found.sampling else ""
    made.add_row("peak", sampled, f"{found.update_peak / GIB:.3f}", style="bold")
    return made


def verdict(found: Estimate, algorithm: Algorithm, setting: Setting, options: Any) -> str:
    """Return whether the run fits, where the memory of a device is known, and what to try first if it does not."""
    memory = options.device_memory
    if memory is None and not setting.on_cpu and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
    if memory is None:
        return ""
    if found.peak <= USABLE * memory * GIB:
        return f"; fits {memory:g} GiB"
    return f"; does not fit {memory:g} GiB, of which {USABLE:.0%} are planned with: try {advice(found, algorithm)}"


def advice(found: Estimate, algorithm: Algorithm) -> str:
    """Return the first option to try."""
    always = sum(found.always.values())
    if found.peak < 2 * always:
        if algorithm.lora is None:
            return "--model.lora {r: 16}, or --trainer.strategy fsdp2 with more devices"
        return "--model.load.dtype bfloat16, or --trainer.strategy fsdp2 with more devices"
    if found.sampling_peak > found.update_peak:
        return "--model.sampling.batch_size N"
    if isinstance(algorithm, OnlineAlgorithm):
        return "--model.updates.num_minibatches N with --trainer.accumulate_grad_batches N"
    return "a smaller --data.batch_size with --trainer.accumulate_grad_batches N"
