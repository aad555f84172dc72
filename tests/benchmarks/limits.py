"""Lower bounds of the time of an update on this machine: `python limits.py SETTINGS` prints them as JSON."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from contenders import Settings

REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """Lower bounds of one update of RLOO, with every prompt computed once.

    Attributes:
        flops: Floating-point operations per second of a large matrix product in the precision of the arithmetic.
        bandwidth: Bytes per second that a sum over a large tensor reads.
        train: Seconds of forward and backward passes.
        sample: Seconds of decoding: for each token of the batch the longer of arithmetic and reading.
        read: Seconds of reading weights and cache during decoding.
        held_mib: MiB of weights, gradients, both moments of the optimizer, and the reference.
        layers: Number of weights that a token is multiplied by in the layers.
        head: The same in the output layer.
    """

    flops: float
    bandwidth: float
    train: float
    sample: float
    read: float
    held_mib: float
    layers: int
    head: int


def limits(settings: Settings, python: str = sys.executable) -> Limits:
    """Measure in a separate process, so that this one stays small."""
    command = [python, __file__, json.dumps(dataclasses.asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the limits could not be measured:\n{done.stderr[-3000:]}")
    return Limits(**json.loads(done.stdout.splitlines()[-1]))


def measure_machine(settings: Settings) -> tuple[float, float]:
    """Measure operations of a matrix product per second, and bytes read per second."""
    import torch

    device = "cpu" if settings.accelerator == "cpu" else "cuda"
    dtype = torch.bfloat16 if settings.precision.startswith("bf16") else torch.float32
    n, count = (1536, 2**27) if device == "cpu" else (8192, 2**30)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    long = torch.randn(count, device=device)
    return 2 * n**3 / best(lambda: a @ b, device), 4 * count / best(long.sum, device)


def best(work: Callable[[], Any], device: str) -> float:
    """Return the seconds of the fastest of a few repetitions."""
    import torch

    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def count(settings: Settings) -> Limits:
    """Count the operations for completions of full length, and divide by the speed of the machine."""
    import torch
    from contenders import LORA
    from transformers import AutoConfig, AutoModelForCausalLM

    from lit_rlhf.models.adapters import add_lora

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings.model))
    config, everything = model.config, sum(p.numel() for p in model.parameters())
    head, layers = model.get_output_embeddings().weight.numel(), multiplied(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cached = 2 * config.num_hidden_layers * key_heads * head_dim  # numbers a token
    size = 2 if settings.precision.startswith("bf16") else 4  # bytes of a number, as decoding reads it
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim  # of a token with a previous one
    n, k, p, t = settings.prompts, settings.samples, settings.prompt_tokens, settings.completion_tokens
    prompts = 2 * layers * n * p + attention * n * p * (p + 1) / 2
    following = 2 * layers * n * k * (t - 1) + attention * n * k * sum(p + i for i in range(1, t))
    train = (2 if settings.lora else 3) * (prompts + following + 2 * head * n * k * t)
    steps = [(prompts + 2 * head * n, size * (layers + head))]
    for i in range(1, t):
        flops = 2 * (layers + head) * n * k + attention * n * k * (p + i)
        steps.append((flops, size * (layers + head + cached * n * k * (p + i))))
    trained = everything
    if settings.lora:
        adapted = add_lora(model, LORA)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    held = everything + 4 * trained  # the weights or the adapter once more: a copy, gradient and two moments
    rate, bandwidth = measure_machine(settings)
    return Limits(
        flops=rate,
        bandwidth=bandwidth,
        train=train / rate,
        sample=sum(max(flops / rate, read / bandwidth) for flops, read in steps),
        read=sum(read / bandwidth for _, read in steps),
        held_mib=4 * held / 2**20,
        layers=layers,
        head=head,
    )


def multiplied(model: Any) -> int:
    """Count the weights that a token is multiplied by before the output layer, with active experts only."""
    import torch

    lookups = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    lookups.add(id(model.get_output_embeddings().weight))
    inner = [p for p in model.parameters() if id(p) not in lookups]
    chosen = getattr(model.config, "num_experts_per_tok", None) or 0
    experts = sum(p.numel() // p.shape[0] * chosen for p in inner if p.ndim == 3)
    return sum(p.numel() for p in inner if p.ndim == 2) + experts


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(count(Settings(**json.loads(sys.argv[1]))))))
