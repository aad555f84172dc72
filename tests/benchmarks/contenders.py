"""Measure updates of one contender in a separate process: `python contenders.py NAME SETTINGS` prints JSON.

`SETTINGS` are the fields of `Settings` as JSON. The other scripts here call it by `measure`, and import little before
that, because the peak memory of a process is at least that of its parent.
"""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LEARNING_RATE, BETA = 1e-6, 0.05


@dataclass(frozen=True)
class Settings:
    """Settings that all contenders share.

    Attributes:
        model: A folder or a hub id.
        prompts: Prompts of a rollout.
        samples: Completions per prompt.
        prompt_tokens: Tokens of a prompt.
        completion_tokens: Tokens of a completion; the maximum if `natural`.
        natural: Whether completions may end with EOS before that.
        precision: Lightning's precision: `32-true` or `bf16-mixed`. Weights are float32.
        lora: Whether an adapter is trained instead of all weights.
        updates: Number of updates.
        accelerator: Lightning's accelerator.
    """

    model: str
    prompts: int = 4
    samples: int = 4
    prompt_tokens: int = 40
    completion_tokens: int = 32
    natural: bool = False
    precision: str = "32-true"
    lora: bool = False
    updates: int = 4
    accelerator: str = "cpu"


Result = dict[str, Any]
"""Output of a process: `seconds` per update and `peak_mib` of memory; for this library also `phases` and `lengths` of
the completions per update."""


def measure(name: str, settings: Settings, python: str = sys.executable) -> Result:
    """Run a contender in a separate process; exit with its error output if it fails."""
    command = [python, __file__, name, json.dumps(dataclasses.asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def make_prompts(tokenizer: Any, count: int, length: int) -> list[str]:
    """Return texts of arbitrary words, each of exactly `length` tokens."""
    rng, prompts = random.Random(0), []
    words = [word.strip() for word in map(tokenizer.decode, range(len(tokenizer))) if word.strip().isalpha()]
    while len(prompts) < count:
        ids = tokenizer(" ".join(rng.choice(words) for _ in range(length)))["input_ids"][:length]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if len(tokenizer(text)["input_ids"]) == length:
            prompts.append(text)
    return prompts


def worth(completions: list[Any], **kwargs: Any) -> list[float]:
    """A cheap reward that differs between completions."""
    return [len(str(completion)) % 17 / 17 for completion in completions]


def make_trainer(accelerator: str, precision: str, updates: int, callback: Any, **options: Any) -> Any:
    """Return a trainer, by default on one device, that writes nothing."""
    import lightning

    return lightning.Trainer(
        **{"devices": 1, **options},
        accelerator=accelerator,
        precision=precision,  # type: ignore[arg-type]
        max_steps=updates,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )


class Laps:
    """Records when the first update begins and when each ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def lap(self, *args: Any, **kwargs: Any) -> None:
        """Record the time."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds of each update."""
        return [end - start for start, end in pairwise(self.times)]


def run_lit_rlhf(settings: Settings, method: str) -> Result:
    """Run updates of this library."""
    import lightning
    import torch
    from transformers import AutoTokenizer

    import lit_rlhf

    laps, phases, lengths = Laps(), [], []

    class Watch(lightning.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            laps.lap()

        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            laps.lap()
            phases.append(phases_of(trainer))  # those of the previous update: the module logs after its callbacks
            lengths.append(module.rollout.completions.lengths.flatten().tolist())

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    texts = make_prompts(tokenizer, settings.prompts * settings.updates, settings.prompt_tokens)
    module = getattr(lit_rlhf, method)(
        settings.model,
        rewards=[worth],
        num_samples=settings.samples,
        kl_coef=BETA,
        lora=LORA if settings.lora else None,
        sampling=lit_rlhf.Sampling(
            max_new_tokens=settings.completion_tokens,
            min_new_tokens=0 if settings.natural else settings.completion_tokens,
        ),
        optimizer=lambda params: torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=0.0),
    )
    trainer = make_trainer(settings.accelerator, settings.precision, settings.updates, Watch())
    trainer.fit(module, lit_rlhf.PromptData([{"prompt": text} for text in texts], batch_size=settings.prompts))
    return {"seconds": laps.seconds(), "phases": [*phases[1:], phases_of(trainer)], "lengths": lengths}


def phases_of(trainer: Any) -> dict[str, float]:
    """Return the seconds of the newest update by phase."""
    return {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("time/")}


def run_trl(settings: Settings) -> Result:
    """Run updates of TRL's `RLOOTrainer` with its fastest options: no gradient checkpointing, no logging."""
    import datasets
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    laps = Laps()

    class Watch(TrainerCallback):
        on_train_begin = on_step_end = staticmethod(laps.lap)

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    texts = make_prompts(tokenizer, settings.prompts * settings.updates, settings.prompt_tokens)
    config = RLOOConfig(
        per_device_train_batch_size=settings.prompts * settings.samples,
        num_generations=settings.samples,
        max_completion_length=settings.completion_tokens,
        generation_kwargs=None if settings.natural else {"min_new_tokens": settings.completion_tokens},
        temperature=1.0,
        beta=BETA,
        num_iterations=1,
        steps_per_generation=1,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=settings.updates,
        gradient_checkpointing=False,
        bf16=settings.precision == "bf16-mixed",
        use_cpu=settings.accelerator == "cpu",
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = RLOOTrainer(
        AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32),
        worth,
        config,
        datasets.Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=tokenizer,
        callbacks=[Watch()],
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA) if settings.lora else None,
    )
    trainer.train()
    return {"seconds": laps.seconds()}


CONTENDERS: dict[str, Callable[[Settings], Result]] = {
    "RLOO": lambda settings: run_lit_rlhf(settings, "RLOO"),
    "PPO": lambda settings: run_lit_rlhf(settings, "PPO"),
    "TRL": run_trl,
}


def peak_mib(settings: Settings) -> float:
    """Return the peak memory of this process: resident, or on the accelerator."""
    if settings.accelerator == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
    given = Settings(**json.loads(sys.argv[2]))
    if Path(given.model).is_dir():
        given = dataclasses.replace(given, model=str(Path(given.model).resolve()))
    outcome = CONTENDERS[sys.argv[1]](given)
    print(json.dumps({**outcome, "peak_mib": peak_mib(given)}))
