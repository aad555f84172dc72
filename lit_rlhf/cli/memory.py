"""`lit-rlhf memory`: what a run will hold on each device, before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from rich import get_console
from rich.table import Table
from rich.text import Text

from lit_rlhf.algorithms import Algorithm
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.data import TextData
from lit_rlhf.errors import InputError
from lit_rlhf.memory.estimate import Calculator, Estimate, Setting
from lit_rlhf.memory.passes import Shape
from lit_rlhf.models.offload import OF_REWARD_MODEL, OPTIONS, check_offload
from lit_rlhf.models.quantized import check_unsharded
from lit_rlhf.training.strategies import FSDP2Strategy
from lit_rlhf.types import Preferences

GIB = 2**30
USABLE = 0.9
"""Share of a device's memory that is planned with: the rest is for CUDA itself and for gaps between tensors."""


@dataclass(frozen=True)
class MemoryReport:
    """What the command prints.

    Attributes:
        algorithm: The algorithm, made with its options.
        data: The data module.
        options: Options of the command.
    """

    algorithm: Algorithm
    data: TextData
    options: Any

    def print(self) -> None:
        """Print the table and the two peaks.

        Raises:
            ValueError: If a length is not known, the strategy is another one, weights are quantized by
                another method than bitsandbytes, or the run would refuse its options.
        """
        algorithm, setting = self.algorithm, read_setting(self.options.trainer)
        sharded = setting.strategy == "fsdp2"
        check_unsharded(algorithm.load_options, sharded)
        device = torch.device("cpu" if setting.on_cpu else "cuda")
        offloaded = [name for name in OPTIONS if getattr(algorithm, name, False)]
        specs = getattr(getattr(algorithm, "scorer", None), "_specs", [])
        offloaded += [OF_REWARD_MODEL for spec in specs if getattr(spec.reward, "offload", False)]
        check_offload(offloaded, device, sharded, setting.devices)
        if isinstance(algorithm, OnlineAlgorithm):
            shape = read_shape(algorithm.num_samples, algorithm.max_new_tokens, self.data, self.options)
            shape = replace(shape, prompts=max(1, shape.prompts // algorithm.dynamic_sampling.rounds))
        else:
            shape = read_shape(2 if algorithm.batch_type is Preferences else 1, 0, self.data, self.options)
        found = Calculator(algorithm, shape, setting).estimate()
        console = get_console()
        console.print(table(found, setting))
        peaks = {"sampling": found.sampling_peak, "update": found.update_peak}
        line = ", ".join(f"{name} {peak / GIB:.2f} GiB" for name, peak in peaks.items() if peak)
        fits = verdict(found, algorithm.lora is not None, setting, self.options.device_memory)
        console.print(Text(f"peak of each device: {line}{fits}"), soft_wrap=True)


def read_setting(trainer: Any) -> Setting:
    """Read how a run is placed on devices from the Trainer's options.

    Raises:
        ValueError: If the strategy is another one.
    """
    accelerator = trainer.accelerator
    cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    given = trainer.devices
    given = given.strip(",").split(",") if isinstance(given, str) and "," in given else given
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


def read_shape(samples: int, sampled: int, data: TextData, options: Any) -> Shape:
    """Return the largest batch of a step.

    Args:
        samples: Completions of each prompt.
        sampled: Tokens of a completion, if they are sampled.
        data: The data module.
        options: Options of the command.

    Raises:
        ValueError: If a length is not known.
    """
    prompt: Any = options.prompt_tokens or data.max_prompt_tokens
    completion: Any = options.completion_tokens or sampled or data.max_completion_tokens
    for name, value in {"prompt": prompt, "completion": completion}.items():
        if not value or value < 1:
            raise InputError(f"the longest {name} is not known: give --{name}_tokens N, or --data.max_{name}_tokens N")
    return Shape(data.batch_size, samples, prompt, completion)


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


def verdict(found: Estimate, has_lora: bool, setting: Setting, memory: float | None) -> str:
    """Return whether the run fits, where the memory of a device is known, and what to try first if it does not."""
    if memory is None and not setting.on_cpu and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
    if memory is None:
        return ""
    if found.peak <= USABLE * memory * GIB:
        return f"; fits {memory:g} GiB"
    return f"; does not fit {memory:g} GiB, of which {USABLE:.0%} are planned with: try {advice(found, has_lora)}"


def advice(found: Estimate, has_lora: bool) -> str:
    """Return the first option to try."""
    always = sum(found.always.values())
    if found.peak < 2 * always:
        if not has_lora:
            return "--model.lora {r: 16}, or --trainer.strategy fsdp2 with more devices"
        return "--model.load.dtype bfloat16, or --trainer.strategy fsdp2 with more devices"
    if found.sampling_peak > found.update_peak:
        return "--model.sampling.batch_size N"
    if found.sampling:
        return "--model.updates.num_minibatches N with --trainer.accumulate_grad_batches N"
    return "a smaller --data.batch_size with --trainer.accumulate_grad_batches N"
