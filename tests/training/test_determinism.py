"""Training is bitwise deterministic on a CPU with several threads, without a flag."""

import pytest
import torch

from lit_rlhf.models.policy import Policy
from lit_rlhf.models.scalar import Critic
from lit_rlhf.types import Demonstrations, Prompts
from runs import SLOW_VARIANTS, make_data, make_module, make_trainer
from tiny import make_llama, make_tokenizer

pytestmark = pytest.mark.timeout(900)  # threads wait for each other on a machine that is shared


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SLOW_VARIANTS)
def test_two_runs_with_the_same_seed_and_a_resumed_one_have_equal_weights(name, ending, tmp_path):
    def train(max_steps=4, ckpt_path=None):
        torch.manual_seed(0)  # initialization of the reward model's head
        module, trainer = make_module(name, ending), make_trainer(tmp_path, max_steps=max_steps, limit_val_batches=0)
        trainer.fit(module, make_data(name), ckpt_path=ckpt_path)
        return trainer, {n: weight.clone() for n, weight in module.state_dict().items()}

    (_, first), (_, second) = train(), train()
    assert not [n for n, weight in first.items() if not torch.equal(weight, second[n])]
    stopped, _ = train(max_steps=2)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    _, resumed = train(ckpt_path=tmp_path / "stopped.ckpt")
    assert not [n for n, weight in first.items() if not torch.equal(weight, resumed[n])]


PROMPTS, SAMPLES, LENGTH = 33, 16, 24
"""Large enough for PyTorch to split the gradient of an indexed cache over threads (2**15 elements or more)."""


def make_batch() -> Demonstrations:
    """Return completions of very different lengths, which are computed in length groups with prompts out of order."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 263, (PROMPTS, 20), generator=generator)
    prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(PROMPTS))
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (PROMPTS, SAMPLES, 1), generator=generator)
    return Demonstrations(prompts, torch.randint(7, 263, mask.shape, generator=generator), mask)


def policy_and_output(batch):
    policy = Policy(make_llama(263, hidden=64), make_tokenizer())
    return policy, lambda: policy.logprobs(batch.prompts, batch)


def critic_and_output(batch, tmp_path):
    make_llama(263, hidden=64).save_pretrained(tmp_path)
    critic = Critic.from_pretrained(tmp_path)
    torch.nn.init.ones_(critic.model.score.weight)
    return critic, lambda: critic.values(batch.prompts, batch).square()


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_multithreaded_gradients_are_bitwise_deterministic(kind, tmp_path):
    batch = make_batch()
    model, compute = policy_and_output(batch) if kind == "policy" else critic_and_output(batch, tmp_path)
    gradients = []
    for _ in range(4):
        model.zero_grad()
        compute().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for second in gradients[1:]:
        assert not [n for n, gradient in gradients[0].items() if not torch.equal(gradient, second[n])]
