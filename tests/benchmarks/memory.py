"""Compare what `lit-rlhf memory` calculates with what runs hold, each in a separate process; exit 1 if one is off.

    python tests/benchmarks/memory.py --model FOLDER

On a CPU the measure is the peak of the resident memory minus that after a small run, with every large tensor returned
to the system when it is freed (`MALLOC_MMAP_THRESHOLD_`): the allocator's own default keeps freed memory, which is not
held. On a GPU it is the peak of the memory that PyTorch has allocated.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

OFFLINE = {"SFT": 1, "KTO": 1, "DPO": 2, "RewardModeling": 2}
"""Completions of a row, by method."""
METHODS = ("RLOO", "Reinforce", "ReMax", "RAFT", "OnlineDPO", "GRPO", "GSPO", "VanillaPG", "PPO", *OFFLINE)
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora": LORA},
    "checkpointing": {"gradient_checkpointing": True},
    "4 bit": {"lora": LORA, "load": {"quantization_config": {"load_in_4bit": True}}},
    "8-bit Adam": {},
}
LIMIT = 0.15
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def status(name: str) -> int:
    """Return a number of bytes from this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peak(reset: bool = True) -> int:
    """Return the peak since the last reset, and reset it."""
    import torch

    if torch.cuda.is_available():
        held = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return held
    held = status("VmHWM")
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return held


def make(case: dict[str, Any], model: str) -> Any:
    """Return the algorithm of a case."""
    import torch

    import lit_rlhf

    options: dict[str, Any] = dict(OPTIONS[case["option"]])
    options["optimizer"] = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)
    if case["option"] == "8-bit Adam":
        from bitsandbytes.optim import AdamW8bit

        options["optimizer"] = lambda params: AdamW8bit(params, lr=1e-6)
    if case["method"] not in OFFLINE:
        tokens = case["completion_tokens"]
        options["sampling"] = lit_rlhf.Sampling(max_new_tokens=tokens, min_new_tokens=tokens)
        reward = lit_rlhf.rewards.Length(maximum=9, unit="chars")  # without differences OnlineDPO makes no update
        options |= {"rewards": [reward], "num_samples": case["samples"]}
    return getattr(lit_rlhf, case["method"])(model, **options)


def fit(case: dict[str, Any], model: str) -> dict[str, int]:
    """Run two updates; return the peaks of the last one's phases.

    Under DDP they are three: in the second it makes its buckets of gradients anew, and does not touch them before the
    backward pass, so that they take no memory of a CPU while the policy samples.
    """
    import lightning
    from contenders import make_prompts, make_trainer

    import lit_rlhf

    algorithm, peaks = make(case, model), {}

    class Watch(lightning.Callback):
        def on_train_batch_start(self, *rest: Any) -> None:
            peak()

        def on_train_batch_end(self, *rest: Any) -> None:
            peaks["update"] = peak()

    if hasattr(algorithm, "new_rollout"):
        collect = algorithm.new_rollout

        def watched(prompts: Any) -> Any:
            peak()
            rollout = collect(prompts)
            peaks["sampling"] = peak()
            return rollout

        algorithm.new_rollout = watched
    rows, length, updates = case["prompts"], case["completion_tokens"], 3 if case["strategy"] == "ddp" else 2
    count = updates * rows * case["devices"] * case["accumulate"]
    texts = make_prompts(algorithm.tokenizer, count, case["prompt_tokens"])
    texts = [text.rpartition(" ")[0] if i % rows == 0 else text for i, text in enumerate(texts)]  # one is padded
    ends = make_prompts(algorithm.tokenizer, 2 * count, length - 1)
    if case["method"] in ("SFT", "KTO"):
        shown = enumerate(zip(texts, ends, strict=False))
        demonstrations = [{"prompt": p, "completion": c, "label": i % 2} for i, (p, c) in shown]
        data: Any = lit_rlhf.DemonstrationData(demonstrations, batch_size=rows)
    elif case["method"] in ("DPO", "RewardModeling"):
        pairs = zip(texts, ends, ends[count:], strict=False)
        data = lit_rlhf.PreferenceData(
            [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs], batch_size=rows
        )
    else:
        data = lit_rlhf.PromptData([{"prompt": text} for text in texts], batch_size=rows)
    sharing = {} if case["devices"] == 1 else {"devices": case["devices"], "strategy": case["strategy"]}
    sharing |= {"accumulate_grad_batches": case["accumulate"]}
    trainer = make_trainer("auto", case["precision"], updates, Watch(), **sharing)
    trainer.fit(algorithm, data)
    return peaks


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Return the bytes beyond those after a small run of the same kind."""
    import torch

    small = {"prompts": 2, "samples": 2, "prompt_tokens": 4, "completion_tokens": 4}
    fit({**case, **small}, "testbed")
    gc.collect()
    base = 0 if torch.cuda.is_available() else status("VmRSS")
    return {name: held - base for name, held in fit(case, case["model"]).items()}


def calculate(case: dict[str, Any]) -> dict[str, int]:
    """Return what the calculator says."""
    import torch

    from lit_rlhf.memory.estimate import Calculator, Setting
    from lit_rlhf.memory.passes import Shape

    algorithm = make(case, case["model"])
    of_a_row = OFFLINE.get(case["method"], case["samples"])
    shape = Shape(case["prompts"], of_a_row, case["prompt_tokens"], case["completion_tokens"])
    setting = Setting(
        case["precision"],
        accumulate=case["accumulate"],
        devices=case["devices"],
        strategy=case["strategy"],
        on_cpu=not torch.cuda.is_available(),
    )
    found = Calculator(algorithm, shape, setting).estimate()
    return {"sampling": found.sampling_peak, "update": found.update_peak}


def child(what: str, case: dict[str, Any]) -> dict[str, int]:
    """Run `measure` or `calculate` in a separate process."""
    command = [sys.executable, __file__, "--child", what, json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    if done.returncode:
        sys.exit(f"{what} {case} failed:\n{done.stderr[-3000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=["full", "LoRA"])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--strategy", default="single", choices=("single", "ddp", "fsdp2"), help="on two processes")
    parser.add_argument("--accumulate", type=int, default=1, help="training steps of an update")
    for name, default in {"prompts": 4, "samples": 4, "prompt-tokens": 64, "completion-tokens": 48}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, case = args.child[0], json.loads(args.child[1])
        found = (measure if what == "measure" else calculate)(case)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(json.dumps(found))
        return
    args.devices = 1 if args.strategy == "single" else 2
    names = ("model", "precision", "strategy", "devices", "accumulate")
    names += ("prompts", "samples", "prompt_tokens", "completion_tokens")
    shared = {name: getattr(args, name) for name in names}
    off = []
    print("| method | option | phase | measured, MiB | calculated, MiB | ratio |\n|---|---|---|---|---|---|")
    for method, option in product(args.methods, args.options):
        case = {"method": method, "option": option, **shared}
        measured, calculated = child("measure", case), child("calculate", case)
        for phase, held in measured.items():
            ratio = calculated[phase] / held
            numbers = f"{held / 2**20:.0f} | {calculated[phase] / 2**20:.0f} | {ratio:.2f}"
            print(f"| {method} | {option} | {phase} | {numbers} |", flush=True)
            off += [f"{method} {option} {phase}"] if abs(ratio - 1) > LIMIT else []
    if off:
        sys.exit(f"more than {LIMIT:.0%} off: {', '.join(off)}")


if __name__ == "__main__":
    main()
