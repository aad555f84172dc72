"""Where the KL may go, by enumeration. See `enumeration`."""

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


def kl_gradient(module, of) -> torch.Tensor:
    """Gradient of what `of` makes of the log-probabilities of all completions under the policy and the reference."""
    logprobs = sequence_logprobs(module.policy.causal_lm)
    with torch.no_grad():
        reference = sequence_logprobs(module.initial)
    module.zero_grad()
    of(logprobs, reference).backward()
    return flat_gradient(module)


def reversed_kl_a_token(module) -> torch.Tensor:
    """Gradient of KL(ref || pi) at every prefix, the prefixes drawn from the policy."""
    module.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    prefixes = {(): 1.0}
    for _ in range(LENGTH):
        following = {}
        for prefix, probability in prefixes.items():
            ids = torch.tensor([[*PROMPT, *prefix]])
            policy = module.policy.causal_lm(ids).logits[0, -1].log_softmax(-1)
            with torch.no_grad():
                reference = module.initial(ids).logits[0, -1].log_softmax(-1)
            total = total + probability * (reference.exp() * (reference - policy)).sum()
            following |= {
                (*prefix, i): probability * float(policy[i].detach().exp()) for i in range(VOCABULARY) if i != EOS
            }
        prefixes = following
    total.backward()
    return flat_gradient(module)


EXACT = ("k1_reward", "k2_loss")


METHODS = {
    "RLOO": {"num_samples": 2},
    "Reinforce": {"num_samples": 1},
    "VanillaPG": {"num_samples": 1, "critic": "head", "vf_coef": 1e-30},
}


def penalised(kl_penalty: str, name: str = "RLOO") -> tuple[torch.Tensor, torch.Tensor]:
    """What a KL penalty takes off the expected gradient; and the gradient of the KL itself."""
    method, options = getattr(lit_rlhf, name), METHODS[name]
    plain = make_module(method, kl_coef=0.0, **options)
    with pytest.warns(UserWarning, match=kl_penalty) if kl_penalty not in EXACT else contextlib.nullcontext():
        module = make_module(method, kl_coef=1.0, kl_penalty=kl_penalty, **options)
    truth = kl_gradient(module, lambda logprobs, reference: (logprobs.exp() * (logprobs - reference)).sum())
    return expected_gradient(plain) - expected_gradient(module), truth


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kl_penalty", EXACT)
def test_two_places_of_the_kl_are_exact(kl_penalty, name):
    assert_same(*penalised(kl_penalty, name))


def test_k3_in_the_loss_warns_and_has_the_gradient_of_the_reverse_kl():
    effect, truth = penalised("k3_loss")
    assert (effect - truth).abs().max() > 1e-2 * truth.abs().max()
    assert_same(effect, reversed_kl_a_token(make_module(num_samples=2)))
