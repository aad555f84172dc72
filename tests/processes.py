"""Runs to compare between one process and two; as a script, it is what each of two processes runs.

python processes.py FOLDER ROOT
"""

import functools
import os
import sys
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback

import lit_rlhf
from runs import make_data, make_module, make_trainer

SEED, ROWS, BATCH = 7, 24, 8


def worth(completion_ids, **kwargs):
    return [sum(ids) % 7 / 4 for ids in completion_ids]


def some_opinion(completion_ids, **kwargs):
    pairs = zip(completion_ids, worth(completion_ids), strict=True)
    return [None if sum(ids) % 3 == 0 else score for ids, score in pairs]


def rows_of_the_second_rank() -> set[str]:
    """The prompts of rank 1 in the first rollout."""
    words = [f"{word} {i}" for i in range(ROWS // 4) for word in ("film", "book", "play", "song")]
    order = np.random.default_rng((SEED, 0)).permutation(ROWS)
    return {words[i] for i in order[BATCH // 2 : BATCH]}


def hardly_ever_equal(completion_ids, **kwargs):
    """Of equals RAFT keeps one by the KL alone, which at first is nothing but rounding."""
    places = [sum(place * token for place, token in enumerate(ids, start=1)) for ids in completion_ids]
    return [None if place % 3 == 0 else place % 101 / 50 for place in places]


def silent_on_one_rank(prompts, completion_ids, **kwargs):
    pairs = zip(prompts, worth(completion_ids), strict=True)
    return [None if prompt in rows_of_the_second_rank() else score for prompt, score in pairs]


def raises_on_one_rank(completions, **kwargs):
    if os.environ.get("LOCAL_RANK") == "1":
        raise OSError("the disk of the judge is full")
    return [0.0] * len(completions)


def judge_raises_on_one_rank(completions, **kwargs):
    if os.environ.get("LOCAL_RANK") == "1":
        raise OSError("the judge has gone home")
    return [0.0] * len(completions)


def sgd(params):
    return torch.optim.SGD(params, lr=0.3)


CASES = {
    "rloo": ("RLOO", {"rewards": [some_opinion]}),
    "invalid on one rank": ("RLOO", {"rewards": [silent_on_one_rank], "minibatches": 2}),
    "left out": ("Reinforce", {"rewards": [worth], "truncated": "leave_out", "baseline": "mean"}),
    "cut both ways": ("RLOO", {"rewards": [worth], "minibatches": 2, "sample_minibatches": 3}),
    "adaptive KL": ("RLOO", {"rewards": [worth], "kl_coef": 0.5}),
    "raft": ("RAFT", {"rewards": [hardly_ever_equal]}),
    "ppo": ("PPO", {"rewards": [worth], "minibatches": 2, "value_coef": 0.01}),
    "vanilla_pg": ("VanillaPG", {"rewards": [some_opinion], "critic": "head", "value_coef": 0.01}),
    "normalised": ("RLOO", {"rewards": [some_opinion], "shaping": {"normalize": True, "clip": 1.0}}),
    "growing by schedule": ("RLOO", {"rewards": [worth]}),
    "growing by noise": ("RLOO", {"rewards": [some_opinion]}),
    "dpo": ("DPO", {}),
    "sft": ("SFT", {}),
    "reward model": ("RewardModeling", {}),
}
"""A method and its options; however a rollout is cut, it makes one update."""

TARGET = 1.9
"""Of the adaptive KL: near that of the second rollout, so that the step is not cut."""


def trainer_of(root: Path, devices: int, **options):
    if devices > 1:
        options["strategy"] = "ddp"
    return make_trainer(root, devices=devices, **options)


class Metrics(Callback):
    """Keeps what was logged with each update, seconds left out."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.updates.append({})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        metrics = trainer.callback_metrics.items()
        self.updates[-1] = {n: float(v) for n, v in metrics if not n.startswith(("time/", "throughput/"))}


def run_case(case: str, folder: Path, root: Path, devices: int) -> dict:
    """Weights and metrics after three updates of 8 prompts, spread over the devices."""
    name, options = CASES[case]
    torch.manual_seed(0)  # the reward model's head
    module = make_module(name, folder, optimizer=sgd, **options)
    module.configure_model()
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    metrics = Metrics()
    callbacks: list[Callback] = [metrics]
    if case == "adaptive KL":
        callbacks.append(lit_rlhf.callbacks.AdaptiveKL(target=TARGET, gain=4.0))
    if case == "growing by schedule":
        callbacks.append(lit_rlhf.callbacks.BatchSchedule(maximum=12 // devices, updates=2))
    if case == "growing by noise":
        callbacks.append(lit_rlhf.callbacks.AdaptiveBatch(12 // devices, every_n_rollouts=1, parts=4 // devices))
    trainer = trainer_of(root, devices, max_steps=3, accumulate_grad_batches=module.repeats, callbacks=callbacks)
    trainer.fit(module, make_data(name, rows=ROWS, batch_size=BATCH // devices, val=4))
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    return {"weights": weights, "start": start, "metrics": metrics.updates}


def either(completions, opponents, **kwargs):
    """A judge of pairs that likes vowels, with a liking for the first."""
    pairs = zip(completions, opponents, strict=True)
    return [0.4 + 0.5 * (a.count("a") > b.count("a")) if len(a) % 3 else None for a, b in pairs]


either.pairwise = True


def run_validated(folder: Path, root: Path, devices: int) -> dict:
    """What a validation finds of seven prompts, with a judge of pairs and completions that people preferred."""
    rows = [{"prompt": f"film {i}", "preferred": "a" * i or None, "other": "ab" * i} for i in range(7)]
    judged = dict(judge=either, opponent="other", evaluation={"preferred": "preferred"})
    module = make_module("RLOO", folder, rewards=[some_opinion], **judged)
    data = lit_rlhf.PromptData(val=rows, batch_size=2)
    return dict(trainer_of(root, devices).validate(module, data, verbose=False)[0])


class Save(Callback):
    """Saves in the middle of an update, in the middle of a rollout, and in both of them later on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx in (0, 1, 6):
            trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")


def run_resumed(folder: Path, root: Path) -> dict:
    """Which weights differ between a run straight through and a resumed one, by checkpoint."""

    def fit(callbacks=(), ckpt_path=None) -> dict:
        module = make_module("Reinforce", folder, rewards=[worth], baseline="mean", minibatches=2, sample_minibatches=2)
        trainer = trainer_of(
            root, 2, max_steps=4, accumulate_grad_batches=2, gradient_clip_val=0.5, callbacks=list(callbacks)
        )
        trainer.fit(module, make_data("Reinforce", rows=ROWS, batch_size=4, val=4), ckpt_path=ckpt_path)
        return {n: v.clone() for n, v in module.state_dict().items()}

    straight = fit([Save(root)])
    differing = {}
    for path in sorted(root.glob("*.ckpt")):
        resumed = fit(ckpt_path=path)
        differing[path.name] = [n for n, v in straight.items() if not torch.equal(v, resumed[n])]
    return differing


def run_failing_judge(folder: Path, root: Path) -> dict:
    """What each process says of a judge that fails in one of them."""
    module = make_module("RLOO", folder, rewards=[worth], judge=judge_raises_on_one_rank)
    said = ""
    try:
        trainer_of(root, 2).validate(module, make_data("RLOO", batch_size=2, val=4), verbose=False)
    except (OSError, RuntimeError) as error:
        said = str(error)
    both: list[str] = [""] * 2
    torch.distributed.all_gather_object(both, said)
    return dict(enumerate(both))


def run_raising(folder: Path, root: Path) -> None:
    module = make_module("RLOO", folder, rewards=[raises_on_one_rank])
    trainer_of(root, 2, max_steps=2, limit_val_batches=0).fit(module, make_data("RLOO", batch_size=2))


def main(folder: Path, root: Path) -> None:
    runs = {case: functools.partial(run_case, case, folder, root, 2) for case in CASES}
    runs["resumed"] = functools.partial(run_resumed, folder, root)
    runs["validated"] = functools.partial(run_validated, folder, root, 2)
    runs["failing judge"] = functools.partial(run_failing_judge, folder, root)
    for name, run in runs.items():
        result = run()
        if os.environ["LOCAL_RANK"] == "0":
            torch.save(result, root / f"{name}.pt")
    run_raising(folder, root)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
