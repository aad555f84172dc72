"""`loss` is a pure function of a rollout, and can be called on one built by hand."""

import dataclasses

import pytest
import torch

import lit_rlhf
from enumerable import make_prompts
from lit_rlhf.types import Completions, Rollout
from runs import ONLINE, make_module


def hand_made_rollout(rollout_type: type[Rollout], **changes) -> Rollout:
    """Return a rollout of two prompts and three completions of up to four tokens, with leaves that require gradient."""
    generator = torch.Generator().manual_seed(3)

    def random():
        return torch.randn(2, 3, 4, generator=generator)

    mask = torch.arange(4) < torch.tensor([[4, 2, 1], [3, 4, 4]]).unsqueeze(-1)
    completions = Completions(torch.ones(2, 3, 4, dtype=torch.long), mask, random(), mask[..., -1])
    fields = {"logprobs": random().requires_grad_(), "old_logprobs": random(), "old_values": random()}
    fields |= {"values": random().requires_grad_(), "value_targets": random()}
    existing = {name: value for name, value in fields.items() if name in rollout_type.__dataclass_fields__}
    return rollout_type(
        prompts=make_prompts([5, 6], [7]),
        completions=completions,
        reference_logprobs=random(),
        rewards=torch.zeros(2, 3),
        component_rewards={},
        valid=torch.ones(2, 3, dtype=torch.bool),
        returns=torch.zeros(2, 3),
        **{**existing, **changes},
    )


def make_advantages(algorithm: lit_rlhf.OnlineAlgorithm) -> torch.Tensor:
    per_token = isinstance(algorithm, lit_rlhf.VanillaPG | lit_rlhf.ReinforcePlusPlus)
    return torch.linspace(-1, 1, 24).view(2, 3, 4) if per_token else torch.linspace(-1, 1, 6).view(2, 3)


@pytest.mark.parametrize("name", ONLINE)
def test_loss_is_a_pure_function_of_the_rollout(name):
    """It needs neither a model nor a Trainer, is deterministic, and has no side effects."""
    algorithm = make_module(name, "nowhere")
    part = hand_made_rollout(algorithm.rollout_type, advantages=make_advantages(algorithm))
    state = dict(vars(algorithm))
    first, second = algorithm.loss(part)[0], algorithm.loss(part)[0]
    assert first.shape == ((2, 3, 4) if algorithm.reduction == "tokens" else (2, 3))
    assert torch.equal(first, second) and first.isfinite().all()
    assert vars(algorithm) == state
    if first.ndim == 3:  # the base leaves the others out
        first = first.masked_fill(~part.loss_mask, 0.0)
    gradient = torch.autograd.grad(first.sum(), part.logprobs)[0]
    assert gradient[part.completions.mask].any() and not gradient[~part.completions.mask].any()


@pytest.mark.parametrize("name", ["PPO", "GRPO", "DrGRPO", "DAPO", "GSPO", "CISPO"])
@pytest.mark.parametrize("clip_range", [0.2, None])
@pytest.mark.parametrize("log_ratio", [90.0, -90.0, 3000.0])
def test_large_log_ratio_has_finite_loss_and_gradient(name, clip_range, log_ratio):
    algorithm = make_module(name, "nowhere", clip_range=clip_range)
    logprobs = torch.full((2, 3, 4), -1.0, requires_grad=True)
    changes = dict(logprobs=logprobs, old_logprobs=logprobs.detach() - log_ratio)
    part = hand_made_rollout(algorithm.rollout_type, advantages=make_advantages(algorithm), **changes)
    terms, metrics = algorithm.loss(part)
    assert terms.isfinite().all()
    assert torch.autograd.grad(terms.sum(), logprobs)[0].isfinite().all()
    assert all(torch.as_tensor(value).isfinite().all() for value, _ in metrics.values())


def test_lists_per_prompt_are_kept_and_lists_per_sample_are_cut():
    @dataclasses.dataclass
    class WithTopics(Rollout):
        topics: list = dataclasses.field(default_factory=list)

    texts = [["a", "b", "c"], ["d", "e", "f"]]
    rollout = hand_made_rollout(WithTopics, texts=texts, topics=["science", "sports"])
    assert rollout.samples(slice(0, 2)).texts == [["a", "b"], ["d", "e"]]
    assert rollout.pick(torch.tensor([[2], [0]])).texts == [["c"], ["d"]]
    assert rollout.samples(slice(0, 2)).topics == rollout.pick(torch.tensor([[2], [0]])).topics == ["science", "sports"]


def test_without_a_coefficient_no_kl_is_computed():
    """Its k3 of a far policy is infinite, and 0 times that is NaN."""
    algorithm = make_module("DrGRPO", "nowhere", kl_coef=0.0)
    logprobs = torch.full((2, 3, 4), -1.0, requires_grad=True)
    changes = dict(logprobs=logprobs, old_logprobs=logprobs.detach(), reference_logprobs=logprobs.detach() + 99)
    part = hand_made_rollout(algorithm.rollout_type, advantages=make_advantages(algorithm)).replace(**changes)
    algorithm.evaluate = lambda part: part
    assert algorithm.loss_terms(part)[1].isfinite().all()
