"""Gradients of the KL penalties k1_reward, k2_loss and k3_loss, by enumeration (see `enumeration`)."""

import contextlib

import pytest
import torch

import lit_rlhf
from enumerable import EOS
from enumeration import (
    LENGTH,
    PROMPT,
    VOCABULARY,
    assert_same,
    expected_gradient,
    flat_gradient,
    make_module,
    sequence_logprobs,
)


def kl_gradient(module, kl) -> torch.Tensor:
    """Return the gradient of `kl(logprobs, reference)`, given the log-probabilities of all completions."""
    logprobs = sequence_logprobs(module.policy.causal_lm)
    with torch.no_grad():
        reference = sequence_logprobs(module.initial)
    module.zero_grad()
    kl(logprobs, reference).backward()
    return flat_gradient(module)


def reverse_kl_gradient(module) -> torch.Tensor:
    """Return the gradient of KL(ref || pi), summed over prefixes sampled from the policy."""
    module.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    prefixes = {(): 1.0}
    for _ in range(LENGTH):
        next_prefixes = {}
        for prefix, probability in prefixes.items():
            ids = torch.tensor([[*PROMPT, *prefix]])
            policy = module.policy.causal_lm(ids).logits[0, -1].log_softmax(-1)
            with torch.no_grad():
                reference = module.initial(ids).logits[0, -1].log_softmax(-1)
            total = total + probability * (reference.exp() * (reference - policy)).sum()
            next_prefixes |= {
                (*prefix, i): probability * float(policy[i].detach().exp()) for i in range(VOCABULARY) if i != EOS
            }
        prefixes = next_prefixes
    total.backward()
    return flat_gradient(module)


EXACT = ("k1_reward", "k2_loss")


ALGORITHMS = {
    "RLOO": {"num_samples": 2},
    "Reinforce": {"num_samples": 1},
    "VanillaPG": {"num_samples": 1, "critic": "head", "vf_coef": 1e-30},
}


@pytest.mark.parametrize("kl_penalty", ["k2_loss", "k3_loss"])
def test_a_penalty_without_a_coefficient_gives_one_warning(kl_penalty):
    with pytest.warns(UserWarning) as caught:
        make_module(lit_rlhf.RLOO, num_samples=2, kl_coef=0.0, kl_penalty=kl_penalty)
    assert [str(warning.message) for warning in caught] == [
        f"kl_penalty={kl_penalty!r} has no effect with kl_coef=0: raise kl_coef, or leave it out"
    ]


def penalty_and_kl_gradient(kl_penalty: str, name: str = "RLOO") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the change in the expected gradient due to a KL penalty, and the gradient of the KL."""
    algorithm, options = getattr(lit_rlhf, name), ALGORITHMS[name]
    plain = make_module(algorithm, kl_coef=0.0, **options)
    with pytest.warns(UserWarning, match=kl_penalty) if kl_penalty not in EXACT else contextlib.nullcontext():
        module = make_module(algorithm, kl_coef=1.0, kl_penalty=kl_penalty, **options)
    truth = kl_gradient(module, lambda logprobs, reference: (logprobs.exp() * (logprobs - reference)).sum())
    return expected_gradient(plain) - expected_gradient(module), truth


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("kl_penalty", EXACT)
def test_k1_reward_and_k2_loss_have_the_exact_kl_gradient(kl_penalty, name):
    assert_same(*penalty_and_kl_gradient(kl_penalty, name))


def test_k3_loss_warns_and_has_the_gradient_of_the_reverse_kl():
    gradient, truth = penalty_and_kl_gradient("k3_loss")
    assert (gradient - truth).abs().max() > 1e-2 * truth.abs().max()
    assert_same(gradient, reverse_kl_gradient(make_module(num_samples=2)))
