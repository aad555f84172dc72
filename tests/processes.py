"""Runs to compare between one process and several. As a script, it is the program of each of several processes:

python processes.py FOLDER ROOT STRATEGY RANKS [CASE ...]
"""

import contextlib
import functools
import itertools
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback
from transformers import LlamaForSequenceClassification

import lit_rlhf
from lit_rlhf.models import sampling
from lit_rlhf.models.sharding import whole
from lit_rlhf.training.strategies import FSDP2Strategy
from runs import ONLINE, make_data, make_module, make_trainer
from tiny import checkpoint_activations, make_llama, make_tokenizer

ROWS, BATCH = 24, 4
"""Seed, rows of the data, and prompts of each rank in a rollout."""


def checksum_reward(completion_ids, **kwargs):
    return [sum(ids) % 7 / 4 for ids in completion_ids]


def reward_with_none(completion_ids, **kwargs):
    pairs = zip(completion_ids, checksum_reward(completion_ids), strict=True)
    return [None if sum(ids) % 3 == 0 else score for ids, score in pairs]


def prompts_of_rank_1() -> set[str]:
    """Return the prompts of rank 1 in the first rollout."""
    words = [f"{word} {i}" for i in range(ROWS // 4) for word in ("film", "book", "play", "song")]
    order = np.random.default_rng((int(os.environ["PL_GLOBAL_SEED"]), 0)).permutation(ROWS)
    return {words[i] for i in order[BATCH : 2 * BATCH]}


def scored_again(module):
    """Return an `evaluate` that scores the rollout once more, without gradient, after the pass with gradient."""
    evaluate = module.evaluate

    def evaluate_twice(part):
        part = evaluate(part)
        with torch.no_grad():
            again = module.policy.logprobs(part.prompts, part.completions)
        return part.replace(logprobs=part.logprobs + 0 * again)

    return evaluate_twice


def reward_with_few_ties(completion_ids, **kwargs):
    """Reward with few ties: RAFT breaks ties by the KL, which is only rounding error at first."""
    sums = [sum(i * token for i, token in enumerate(ids, start=1)) for ids in completion_ids]
    return [None if total % 3 == 0 else total % 101 / 50 for total in sums]


def none_on_one_rank(prompts, completion_ids, **kwargs):
    pairs = zip(prompts, checksum_reward(completion_ids), strict=True)
    return [None if prompt in prompts_of_rank_1() else score for prompt, score in pairs]


def raises_on_one_rank(completions, **kwargs):
    if os.environ.get("LOCAL_RANK") == "1":
        raise OSError("the disk of the judge is full")
    return [0.0] * len(completions)


def judge_raises_on_one_rank(completions, **kwargs):
    if os.environ.get("LOCAL_RANK") == "1":
        raise OSError("the judge failed")
    return [0.0] * len(completions)


def first_token_of_rank_1(sample):
    """Return a function that samples like `sample`, and cuts the completions of `prompts_of_rank_1` to one token."""

    def short(prompts):
        completions = sample(prompts)
        keep = torch.ones_like(completions.mask)
        keep[[i for i, text in enumerate(prompts.text) if text in prompts_of_rank_1()], :, 1:] = False
        mask = completions.mask & keep
        cut = {"logprobs": completions.logprobs * mask, "entropy": completions.entropy * mask}
        longest = int(mask.sum(-1).max())
        return completions.replace(mask=mask, **cut).map(lambda t: t[..., :longest] if t.ndim == 3 else t)

    return short


def token_length(completion_ids, **kwargs):
    return [[len(str(token)) / 4 for token in ids] for ids in completion_ids]


token_length.token_level = True
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def sgd(params):
    return torch.optim.SGD(params, lr=0.3)


def slow_sgd(params):
    return torch.optim.SGD(params, lr=1e-3)


CASES = {
    "rloo": ("RLOO", {"rewards": [reward_with_none]}),
    "invalid on one rank": ("RLOO", {"rewards": [none_on_one_rank], "num_minibatches": 2}),
    "mask truncated": (
        "Reinforce",
        {"rewards": [checksum_reward], "mask_truncated_completions": True, "baseline": "mean"},
    ),
    "both minibatches": ("RLOO", {"rewards": [checksum_reward], "num_minibatches": 2, "sample_minibatches": 3}),
    "adaptive KL": ("RLOO", {"rewards": [checksum_reward], "kl_coef": 0.5}),
    "scored again": ("RLOO", {"rewards": [checksum_reward]}),
    "raft": ("RAFT", {"rewards": [reward_with_few_ties]}),
    "ppo": ("PPO", {"rewards": [checksum_reward], "num_minibatches": 2, "vf_coef": 0.01}),
    "vanilla_pg": ("VanillaPG", {"rewards": [reward_with_none], "critic": "head", "vf_coef": 0.01}),
    "normalized": ("RLOO", {"rewards": [reward_with_none], "normalize": True, "clip": 1.0}),
    "growing by schedule": ("RLOO", {"rewards": [checksum_reward]}),
    "growing by noise": ("RLOO", {"rewards": [reward_with_none]}),
    "one token on rank 1": ("RLOO", {"rewards": [checksum_reward], "num_minibatches": 2}),
    "token rewards": ("Reinforce", {"rewards": [token_length, checksum_reward], "baseline": "mean"}),
    "KL in the loss": ("GRPO", {"rewards": [checksum_reward], "kl_penalty": "k2_loss", "num_minibatches": 2}),
    "lora": ("RLOO", {"rewards": [checksum_reward], "lora": LORA, "num_minibatches": 2}),
    "dpo": ("DPO", {}),
    "sft": ("SFT", {}),
    "reward model": ("RewardModeling", {}),
    "dr_grpo": ("DrGRPO", {"rewards": [reward_with_none], "num_minibatches": 2}),
    "dapo": ("DAPO", {"rewards": [reward_with_none], "num_minibatches": 2}),
    "gspo": ("GSPO", {"rewards": [reward_with_none], "num_minibatches": 2}),
    "cispo": ("CISPO", {"rewards": [reward_with_none], "num_minibatches": 2, "kl_coef": 0.05}),
    "reinforce++": ("ReinforcePlusPlus", {"rewards": [reward_with_none], "num_minibatches": 2}),
    "reinforce++ baseline": ("ReinforcePlusPlusBaseline", {"rewards": [reward_with_none], "num_minibatches": 2}),
    "opo": ("OPO", {"rewards": [reward_with_none], "num_minibatches": 2}),
    "remax": ("ReMax", {"rewards": [reward_with_none], "num_minibatches": 2}),
    "batch mean": ("ReinforceBatchMean", {"rewards": [reward_with_none], "num_minibatches": 2}),
    "dynamic sampling": ("RLOO", {"rewards": [reward_with_few_ties], "reward": "reward_with_few_ties"}),
    "online dpo": ("OnlineDPO", {"rewards": [reward_with_few_ties], "kl_coef": 0.0}),
    "kto": ("KTO", {}),
    "ipo": ("IPO", {"optimizer": slow_sgd}),
    "scored by a reward model": ("RLOO", {}),
    "gradient checkpointing": ("PPO", {"rewards": [checksum_reward], "vf_coef": 0.01}),
    "bf16-mixed": ("PPO", {"vf_coef": 0.01}),
}
"""Algorithm and options by case. In each, a rollout is one update, for any number of minibatches."""

SLOW = [
    "dr_grpo",
    "ipo",
    "scored by a reward model",
    "gradient checkpointing",
    "mask truncated",
    "both minibatches",
    "raft",
    "normalized",
    "growing by noise",
    "KL in the loss",
    "dapo",
    "gspo",
    "cispo",
    "reinforce++",
    "reinforce++ baseline",
    "opo",
    "remax",
    "batch mean",
    "dynamic sampling",
    "online dpo",
    "kto",
]
QUICK = [case for case in CASES if case not in SLOW]
IN_STEP = ["rloo", "scored again", "one token on rank 1", "ppo", "dpo", "bf16-mixed"]
"""Cases that are run with passes in step, too."""

REWARD_MODEL = "reward_model"
TARGET = 1.9
"""Target of the adaptive KL: near the KL of the second rollout, so that the step is not clipped."""


STRATEGIES = {
    "DDP": lambda: "ddp",
    "FSDP2": lambda: "fsdp2",
    "FSDP2 in step": lambda: FSDP2Strategy(gather=False),
}
strategy = "DDP"


def make_distributed_trainer(root: Path, devices: int, **options):
    if devices > 1:
        options["strategy"] = STRATEGIES[strategy]()
    return make_trainer(root, devices=devices, **options)


class Metrics(Callback):
    """Record the metrics logged with each update, without timings."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.updates.append({})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        metrics = trainer.callback_metrics.items()
        self.updates[-1] = {n: float(v) for n, v in metrics if not n.startswith(("time/", "throughput/"))}


@contextlib.contextmanager
def recorded_draws():
    """Yield a list that gets the distance of the closest draw from where its token changes, for each token sampled."""
    plain, distances = sampling.inverse_cdf, [1.0]

    def recorded(probabilities, noise):
        edges = probabilities.double().cumsum(-1)
        distance = (edges[:, :-1] - noise.double().unsqueeze(-1) * edges[:, -1:]).abs()
        distances.append(float(distance.nan_to_num(1.0).min()))
        return plain(probabilities, noise)

    sampling.inverse_cdf = recorded
    try:
        yield distances
    finally:
        sampling.inverse_cdf = plain


def run_case(case: str, folder: Path, root: Path, devices: int, ranks: int = 2) -> dict:
    """Return weights and metrics of three updates, of BATCH prompts for each of `ranks`, on so many devices.

    And how far the closest draw was from another token.
    """
    name, options = CASES[case]
    torch.manual_seed(0)  # initialization of the reward model's head
    if name in ONLINE and "rewards" not in options:
        options = {**options, "rewards": [lit_rlhf.rewards.RewardModel(folder / REWARD_MODEL)]}
    module = make_module(name, folder, **{"optimizer": sgd, **options})
    module.configure_model()
    if case == "one token on rank 1":
        module.sample = first_token_of_rank_1(module.sample)
    if case == "scored again":
        module.evaluate = scored_again(module)
    if case == "gradient checkpointing":
        checkpoint_activations(module.policy.model)
        checkpoint_activations(module.critic.model)
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    metrics = Metrics()
    callbacks: list[Callback] = [metrics]
    batch, largest = BATCH * ranks // devices, 6 * ranks // devices
    if case == "adaptive KL":
        callbacks.append(lit_rlhf.callbacks.AdaptiveKL(target=TARGET, gain=4.0))
    if case == "growing by schedule":
        callbacks.append(lit_rlhf.callbacks.BatchSchedule(maximum=largest, updates=2))
    if case == "growing by noise":
        parts = 2 * ranks // devices
        callbacks.append(lit_rlhf.callbacks.AdaptiveBatch(largest, every_n_rollouts=1, parts=parts))
    trainer = make_distributed_trainer(
        root,
        devices,
        max_steps=1 if case == "bf16-mixed" else 3,
        accumulate_grad_batches=module.steps_per_rollout,
        callbacks=callbacks,
        precision="bf16-mixed" if case == "bf16-mixed" else None,
    )
    with recorded_draws() as distances:
        trainer.fit(module, make_data(name, rows=ROWS, batch_size=batch, val=4))
    weights = {n: whole(p.detach()).clone() for n, p in module.named_parameters()}
    return {"weights": weights, "start": start, "metrics": metrics.updates, "closest_draw": min(distances)}


def save_models(folder: Path) -> None:
    """Write a policy with 65 EOS tokens into a folder, and a reward model into a folder in it."""
    tokenizer = make_tokenizer()
    model = make_llama(len(tokenizer), num_labels=1)
    model.generation_config.eos_token_id = list(range(2, 262, 4))
    for name, saved in {".": model, REWARD_MODEL: LlamaForSequenceClassification(model.config)}.items():
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def vowel_judge(completions, opponents, **kwargs):
    """Pairwise judge that prefers the letter a, with a bias towards the first completion."""
    pairs = zip(completions, opponents, strict=True)
    return [0.4 + 0.5 * (a.count("a") > b.count("a")) if len(a) % 3 else None for a, b in pairs]


vowel_judge.pairwise = True


def run_validated(folder: Path, root: Path, devices: int) -> dict:
    """Return the metrics of a validation on seven prompts, with a pairwise judge and preferred completions."""
    rows = [{"prompt": f"film {i}", "preferred": "a" * i or None, "other": "ab" * i} for i in range(7)]
    judged = dict(judge=vowel_judge, compare_to="other", preferred="preferred")
    module = make_module("RLOO", folder, rewards=[reward_with_none], **judged)
    data = lit_rlhf.PromptData(val=rows, batch_size=2)
    return dict(make_distributed_trainer(root, devices).validate(module, data, verbose=False)[0])


def run_fitted_twice(folder: Path, root: Path, devices: int) -> dict:
    """Return the metrics and the weights of one module that two Trainers train, and the first of them once more."""
    metrics = Metrics()
    module = make_module("PPO", folder, rewards=[checksum_reward], optimizer=sgd, vf_coef=0.01)
    trainers = [make_distributed_trainer(root, devices, max_steps=1, callbacks=[metrics]) for _ in range(2)]
    for trainer, steps in zip([*trainers, trainers[0]], (1, 1, 2), strict=True):
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit(module, make_data("PPO", rows=ROWS, batch_size=2 * BATCH // devices, val=4))
    weights = {n: whole(p.detach()).clone() for n, p in module.named_parameters()}
    return {"weights": weights, "metrics": metrics.updates}


class SeedModels(Callback):
    """Seed the new head of a reward model, after DDP has seeded its processes anew."""

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(0)


def run_held_out(folder: Path, root: Path, devices: int) -> dict:
    """Return the metrics of three held-out rows, which two processes cannot share equally, after one update."""
    found = {}
    for name in ("DPO", "IPO", "KTO", "RewardModeling", "SFT"):
        module = make_module(name, folder, optimizer=lambda params: torch.optim.SGD(params, lr=0.01))
        data = make_data(name, rows=4, batch_size=4 // devices, eval_batch_size=2)
        seed = [SeedModels()]
        make_distributed_trainer(root, devices, max_steps=1, limit_val_batches=0, callbacks=seed).fit(module, data)
        metrics = make_distributed_trainer(root, devices).validate(module, data, verbose=False)[0]
        found |= {f"{name} {n}": v for n, v in metrics.items()}
    return found


class SaveCheckpoints(Callback):
    """Save checkpoints within an update, within a rollout, and later within both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx in (0, 1, 6):
            trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")


def run_resumed(folder: Path, root: Path) -> dict:
    """Return by checkpoint the weights that differ between an uninterrupted run and a resumed one."""

    def fit(callbacks=(), ckpt_path=None) -> dict:
        module = make_module(
            "Reinforce", folder, rewards=[checksum_reward], baseline="mean", num_minibatches=2, sample_minibatches=2
        )
        trainer = make_distributed_trainer(
            root, 2, max_steps=4, accumulate_grad_batches=2, gradient_clip_val=0.5, callbacks=list(callbacks)
        )
        trainer.fit(module, make_data("Reinforce", rows=ROWS, batch_size=4, val=4), ckpt_path=ckpt_path)
        return {n: whole(v).clone() for n, v in module.state_dict().items()}

    uninterrupted = fit([SaveCheckpoints(root)])
    differing = {}
    for path in sorted(root.glob("*.ckpt")):
        resumed = fit(ckpt_path=path)
        differing[path.name] = [n for n, v in uninterrupted.items() if not torch.equal(v, resumed[n])]
    return differing


def run_failing_judge(folder: Path, root: Path) -> dict:
    """Return the error message of each process for a judge that fails in one of them."""
    module = make_module("RLOO", folder, rewards=[checksum_reward], judge=judge_raises_on_one_rank)
    message = ""
    try:
        make_distributed_trainer(root, 2).validate(module, make_data("RLOO", batch_size=2, val=4), verbose=False)
    except (RuntimeError, ValueError) as error:
        message = str(error)
    return on_each_process(message)


def on_each_process(value) -> dict:
    """Return what each process found, by rank."""
    values = [None] * 2
    torch.distributed.all_gather_object(values, value)
    return dict(enumerate(values))


calls = itertools.count()


def fails_on_rank_1(completions, **kwargs):
    """Fail for every second prompt, with three completions each."""
    if os.environ["LOCAL_RANK"] == "1" and next(calls) // 3 % 2:
        raise OSError("the server is away")
    return [float(len(text)) for text in completions]


def run_warning(folder: Path, root: Path) -> dict:
    """Return the warnings of each process for a reward that fails on rank 1 for all completions of a prompt."""
    reward = lit_rlhf.rewards.Guarded(fails_on_rank_1, retries=0, batch_size=1)
    module = make_module("RLOO", folder, rewards=[reward])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_distributed_trainer(root, 2, max_steps=1, limit_val_batches=0)
        trainer.fit(module, make_data("RLOO", rows=ROWS, batch_size=BATCH))
    return on_each_process([str(warning.message) for warning in caught])


def run_missing_checkpoint(folder: Path, root: Path) -> dict:
    """Return the message of each process for a checkpoint that only rank 0 finds."""
    path = root / ("0.ckpt" if os.environ["LOCAL_RANK"] == "0" else "elsewhere.ckpt")
    message = ""
    trainer = make_distributed_trainer(root, 2, callbacks=[lit_rlhf.callbacks.SaveOnSignal()])
    try:
        trainer.fit(make_module("SFT", folder), make_data("SFT"), ckpt_path=path)
    except ValueError as error:
        message = str(error)
    return on_each_process(message)


def run_full_disk(folder: Path, root: Path) -> dict:
    """Return what could not be written by each process, with a disk on which rank 0 can write no policy."""
    keeper = lit_rlhf.callbacks.PolicyCheckpoint(monitor="val/loss", mode="min")
    module = make_module("SFT", folder)

    def save_model(*args):
        raise OSError(28, "No space left on device")

    module.save_model = module.rebuild_model = save_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_distributed_trainer(root, 2, max_steps=1, callbacks=[keeper], enable_checkpointing=True)
        trainer.fit(module, make_data("SFT", batch_size=2))
    return on_each_process(keeper.unwritten.reasons)


def run_raising(folder: Path, root: Path) -> None:
    module = make_module("RLOO", folder, rewards=[raises_on_one_rank])
    make_distributed_trainer(root, 2, max_steps=2, limit_val_batches=0).fit(module, make_data("RLOO", batch_size=2))


def main(folder: Path, root: Path, ranks: int, cases: list[str]) -> None:
    every = cases or QUICK
    save_results({case: functools.partial(run_case, case, folder, root, ranks, ranks) for case in every}, root)
    if cases:
        return
    runs = {}
    runs["resumed"] = functools.partial(run_resumed, folder, root)
    runs["validated"] = functools.partial(run_validated, folder, root, 2)
    runs["fitted twice"] = functools.partial(run_fitted_twice, folder, root, 2)
    runs["held out"] = functools.partial(run_held_out, folder, root, 2)
    runs["failing judge"] = functools.partial(run_failing_judge, folder, root)
    runs["warning"] = functools.partial(run_warning, folder, root)
    runs["missing checkpoint"] = functools.partial(run_missing_checkpoint, folder, root)
    runs["full disk"] = functools.partial(run_full_disk, folder, root)
    save_results(runs, root)
    run_raising(folder, root)


def save_results(runs: dict, root: Path) -> None:
    for name, run in runs.items():
        result = run()
        if os.environ["LOCAL_RANK"] == "0":
            torch.save(result, root / f"{name}.pt")


if __name__ == "__main__":
    strategy = sys.argv[3]
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4]), sys.argv[5:])
