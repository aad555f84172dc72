"""Short training runs that record rollouts, metrics and weights."""

import torch
from lightning.pytorch import Callback

from enumerable import make_prompts
from lit_rlhf.types import Prompts
from runs import make_data, make_trainer
from runs import make_module as make_any_module
from tiny import make_tokenizer

LEARNING_RATE = 0.5


def checksum_reward(completion_ids, **kwargs):
    return [sum(ids) % 7 / 4 for ids in completion_ids]


def reward_with_none(completion_ids, **kwargs):
    """Return None for about a third of the completions."""
    scores = zip(completion_ids, checksum_reward(completion_ids), strict=True)
    return [None if sum(ids) % 3 == 0 else score for ids, score in scores]


def token_reward(completion_ids, **kwargs):
    return [[token % 5 / 4 for token in ids] for ids in completion_ids]


token_reward.token_level = True


def make_module(name, folder, **options):
    if name in ("RLOO", "Reinforce"):
        options = {"rewards": [checksum_reward], **options}
    return make_any_module(name, folder, **options)


class Recorder(Callback):
    """Record every rollout, and the metrics of each training step."""

    def __init__(self) -> None:
        self.rollouts, self.metrics = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if getattr(module, "rollout", None) is not None and batch_idx % module.steps_per_rollout == 0:
            self.rollouts.append(module.rollout)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def sgd(params):
    return torch.optim.SGD(params, lr=LEARNING_RATE)


def train(name, folder, root, updates=1, trainer=None, data=None, module=None, loader=None, **options):
    """Train with plain SGD, which exposes a wrong scale of the gradient; return the weights and the recorder."""
    recorder = Recorder()
    torch.manual_seed(0)  # initialization of the reward model's head
    options.setdefault("optimizer", sgd)
    module = module or make_module(name, folder, **options)
    runner = make_trainer(root, max_steps=updates, callbacks=[recorder], limit_val_batches=0, **(trainer or {}))
    runner.fit(module, loader) if loader else runner.fit(module, make_data(name, **(data or {})))
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    return weights, recorder


def assert_same_update(actual, expected, start) -> None:
    largest_change = max(float((expected[n] - start[n]).abs().max()) for n in expected)
    assert largest_change > 1e-2
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, atol=1e-4 * largest_change, rtol=0, msg=name)


def initial_weights(name, folder):
    torch.manual_seed(0)
    module = make_module(name, folder)
    module.configure_model()
    return {n: p.detach() for n, p in module.named_parameters()}


def make_batch(*words: str) -> Prompts:
    tokenizer = make_tokenizer()
    prompts = make_prompts(*[tokenizer(word)["input_ids"] for word in words])
    return prompts.replace(text=list(words))
