from random import Random

import pytest

from lit_rlhf.testbed import Raters, briefs, gold
from lit_rlhf.testbed.world import write


def written_pairs(n=1000):
    rng = Random(0)
    return [(brief.text, (write(brief, rng), write(brief, rng))) for brief in briefs(n)]


def values(rows):
    prompts = [row["prompt"] for row in rows]
    return [gold(prompts=prompts, completions=[row[key] for row in rows]) for key in ("chosen", "rejected")]


def test_raters_agree_with_gold_at_the_rate_of_the_model():
    pairs, raters = written_pairs(), Raters(temperature=0.5, lapse=0.1)
    rows = raters.preferences(pairs, seed=1)
    chosen, rejected = values(rows)
    expected = sum(raters.probability(max(c, r), min(c, r)) for c, r in zip(chosen, rejected, strict=True))
    agreed = sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(chosen, rejected, strict=True))
    deviation = 0.5 * len(rows) ** 0.5
    assert abs(agreed - expected) < 3 * deviation
    assert 0.6 < agreed / len(rows) < 0.95


def test_lapses_bound_the_probability():
    raters = Raters(temperature=1e-2, lapse=0.2)
    assert raters.probability(1.0, 0.0) == pytest.approx(0.9)
    assert raters.probability(0.0, 1.0) == pytest.approx(0.1)
    assert raters.probability(0.0, 0.0) == pytest.approx(0.5)


def test_probabilities_of_both_orders_sum_to_one():
    raters = Raters()
    assert raters.probability(0.3, -0.4) + raters.probability(-0.4, 0.3) == pytest.approx(1.0)


def test_preferences_depend_on_the_seed_and_equal_pairs_are_dropped():
    pairs = [*written_pairs(100), (briefs(1)[0].text, ("It was good.", "It was good."))]
    rows = Raters().preferences(pairs, seed=1)
    assert rows == Raters().preferences(pairs, seed=1)
    assert rows != Raters().preferences(pairs, seed=2)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert len(rows) <= 100
