"""Importance weights: by hand, by enumeration in the second update of a rollout, and in runs."""

import itertools
import math

import pytest
import torch

import lit_rlhf
from enumerable import make_completions, make_prompts, plain_logprobs
from enumeration import (
    ALL,
    PROMPT,
    SEQUENCE_REWARDS,
    assert_same,
    flat_gradient,
    make_module,
    sequence_logprobs,
    sequence_reward,
    total_rewards,
    true_gradient,
)
from lit_rlhf.errors import InputError
from lit_rlhf.training.importance import Importance
from runs import differing_tensors, make_data, make_trainer, training_state
from runs import make_module as make_tiny
from tensors import double

GROUP = [ALL[4], ALL[1], ALL[5], ALL[0]]
LOG = math.log(3.0)


@pytest.mark.parametrize(
    ("options", "weights", "cut"),
    [
        ({"correction": "truncate", "level": "token"}, [[2.0, 1.0, 1 / 3], [1.0, 1.0, 1.0]], [1, 0, 0, 0, 0, 0]),
        ({"correction": "mask", "level": "token"}, [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]], [1, 0, 1, 0, 0, 0]),
        ({"correction": "truncate", "cap": 1.0}, [1.0, 1.0], [0, 0]),
        ({"correction": "mask", "floor": 0.0}, [1.0, 1.0], [0, 0]),
    ],
    ids=str,
)
def test_weights_by_hand(options, weights, cut):
    """Ratios of 3, 1 and 1/3, whose product is 1; the other completion's second and third tokens are padding."""
    now, then = double([[LOG, 0.0, -LOG], [0.0, 5.0, 5.0]]), torch.zeros(1, 2, 3).double()
    mask = torch.tensor([[[True, True, True], [True, False, False]]])
    actual, actual_cut = Importance(**options).weights(now, then, mask)
    torch.testing.assert_close(actual, double(weights))
    assert actual_cut.flatten().int().tolist() == cut


def second_update(module, group) -> torch.Tensor:
    """Return the gradient of the second update on a rollout, after `module.move` has changed the weights."""
    prompts, old = make_prompts(PROMPT), {name: p.detach().clone() for name, p in module.named_parameters()}
    module.sample = lambda prompts: make_completions(module.policy, prompts, [list(group)])
    for step in range(2):
        module.zero_grad()
        module.training_step(prompts, step).backward()
        module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
        if step == 0:
            move(module)
    gradient = flat_gradient(module)
    for name, parameter in module.named_parameters():
        parameter.data.copy_(old[name])
    return gradient


def move(module) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("method", [lit_rlhf.RLOO, lit_rlhf.Reinforce])
def test_the_second_update_is_unbiased_with_sequence_weights(method):
    """Averaged over groups of the policy that sampled, it is the gradient at the policy after the first update."""
    options = dict(num_samples=2, kl_coef=0.0, update_epochs=2)
    plain = make_module(method, **options)
    corrected = make_module(method, correction="truncate", cap=math.inf, **options)
    probabilities = dict(zip(ALL, sequence_logprobs(plain.policy.causal_lm).exp().tolist(), strict=True))
    means = []
    for module in (plain, corrected):
        state, mean = module.running_state(), 0.0
        for group in itertools.product(ALL, repeat=2):
            module.load_running_state(state)
            mean = mean - math.prod(probabilities[y] for y in group) * second_update(module, group)
        means.append(mean)
    move(plain)
    true = true_gradient(plain, total_rewards((sequence_reward,)))
    assert_same(means[1], true)
    assert (means[0] - true).norm() > 0.05 * true.norm()


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_rloo_is_weighed_completion_by_completion_or_token_by_token(correction, level):
    options = dict(correction=correction, level=level, cap=1.05, **({"floor": 0.9} if correction == "mask" else {}))
    module = make_module(lit_rlhf.RLOO, num_samples=4, kl_coef=0.0, update_epochs=2, **options)
    logged = {}
    module.log_dict = lambda metrics, **kwargs: logged.update(metrics)
    old = [plain_logprobs(module.policy.causal_lm, PROMPT, y).detach() for y in GROUP]
    actual = second_update(module, GROUP)
    move(module)
    rewards, total = [SEQUENCE_REWARDS[y] for y in GROUP], 0.0
    for i, (y, before) in enumerate(zip(GROUP, old, strict=True)):
        now = plain_logprobs(module.policy.causal_lm, PROMPT, y)
        ratio = (now - before).detach()
        ratio = (ratio.sum() if level == "sequence" else ratio).exp()
        weight = ratio.clamp(max=1.05) if correction == "truncate" else ratio * ((ratio <= 1.05) & (ratio >= 0.9))
        advantage = rewards[i] - sum(rewards[:i] + rewards[i + 1 :]) / 3
        total = total - (weight * advantage * now).sum() / 4
    module.zero_grad()
    total.backward()
    assert_same(actual, flat_gradient(module))
    assert 0 < logged["train/importance_cut"] < 1


@pytest.mark.parametrize("name", ["RLOO", "VanillaPG"])
def test_the_first_update_is_exactly_that_without_weights(name, tiny, tmp_path):
    trainers = [make_trainer(tmp_path, max_steps=1) for _ in range(2)]
    for trainer, options in zip(trainers, [{}, {"correction": "mask", "level": "token"}], strict=True):
        trainer.fit(make_tiny(name, tiny, update_epochs=2, **options), make_data(name, val=None))
    assert not differing_tensors(*map(training_state, trainers))


def test_a_correction_without_effect_gives_a_warning(tiny, tmp_path):
    for name, options, message in (
        ("RLOO", {}, "no effect at one update per rollout"),
        ("GRPO", {"update_epochs": 2}, "the method's own ratio corrects for updates"),
    ):
        module = make_tiny(name, tiny, correction="truncate", **options)
        with pytest.warns(UserWarning, match=message):
            make_trainer(tmp_path, max_steps=1).fit(module, make_data(name, val=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0.5}, "cap=0.5 must be at least 1"),
        ({"floor": 1.5}, "floor=1.5 must be between 0 and 1"),
        ({"cap": 3.0}, "cap=3.0 has no effect with correction='none': choose truncate or mask"),
        ({"level": "token"}, "level='token' has no effect with correction='none'"),
        ({"correction": "truncate", "floor": 0.1}, "floor=0.1 has no effect with correction='truncate': choose mask"),
        ({"correction": "mask", "cap": 1.0, "floor": 1.0}, "floor=1 and cap=1 mask all that differs"),
    ],
    ids=str,
)
def test_options_out_of_range_or_without_effect_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Importance(**options)
