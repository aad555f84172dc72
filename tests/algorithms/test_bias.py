"""Which methods follow the gradient of the expected reward, by enumeration, and how far the others turn from it."""

import math
from pathlib import Path

import pytest

import lit_rlhf
from enumeration import BETA, assert_same, expected_gradient, make_module, sequence_reward, total_rewards, true_gradient

GUIDE = Path(__file__).parents[2] / "lit_rlhf" / "algorithms" / "README.md"


def gradients(name: str, num_samples: int, kl_coef: float, **options):
    module = make_module(getattr(lit_rlhf, name), num_samples=num_samples, kl_coef=kl_coef, **options)
    return expected_gradient(module), true_gradient(module, total_rewards((sequence_reward,)))


@pytest.mark.parametrize(
    ("name", "scale", "kl_coef"),
    [("ReMax", 1.0, BETA), ("ReinforceBatchMean", 0.5, BETA), ("DrGRPO", 0.25, 0.0)],
)
def test_expected_gradient_has_the_direction_of_the_true_one(name, scale, kl_coef):
    """The scale is `1 - 1/N` of a mean that contains the return itself, over `max_new_tokens` (2) for Dr. GRPO."""
    expected, true = gradients(name, 2, kl_coef)
    assert_same(expected / scale, true)


ANGLES = {
    "OPO": 0.4, "GRPO": 4.8, "DAPO": 4.1, "ReinforcePlusPlus": 5.8, "ReinforcePlusPlusBaseline": 4.8, "RAFT": 4.6,
}  # fmt: skip
"""Angle to the true gradient in degrees, of two samples and one prompt, without a KL."""


def angle_of(expected, true) -> float:
    """Return the angle between two gradients, in degrees."""
    return math.degrees(math.acos(float(expected @ true / (expected.norm() * true.norm()))))


@pytest.mark.parametrize(("kl_penalty", "degrees"), [("k3_loss", 47.6), ("k1_reward", 6.3)])
def test_the_kl_by_k3_in_the_loss_turns_the_gradient_most(kl_penalty, degrees):
    assert angle_of(*gradients("GRPO", 2, BETA, kl_penalty=kl_penalty)) == pytest.approx(degrees, abs=0.051)
    assert f"{degrees} degrees with `{kl_penalty}`" in " ".join(GUIDE.read_text().split())


@pytest.mark.parametrize("name", ANGLES)
def test_biased_methods_turn_from_the_true_gradient_by_a_known_angle(name):
    expected, true = gradients(name, 2, 0.0)
    assert angle_of(expected, true) == pytest.approx(ANGLES[name], abs=0.051)
    assert f"| `{name}` | biased | {ANGLES[name]} |" in GUIDE.read_text()
