"""Torchmetrics of completions against known values."""

import math

import pytest
import torch

from lit_rlhf.evaluation import metrics


def distinct_n(completions, n):
    metric = metrics.DistinctN(n)
    metric.update([])
    for ids in completions:  # one batch per completion
        metric.update([ids])
    return float(metric.compute())


@pytest.mark.parametrize(
    ("completions", "n", "share"),
    [
        ([[1, 2, 3]], 1, 1),
        ([[1, 1, 1, 1]], 1, 1 / 4),
        ([[1, 2, 1, 2]], 2, 2 / 3),
        ([[1, 2], [1, 2]], 2, 1 / 2),
        ([[1, 2], [2, 1]], 2, 1),
        ([[1, 2], [2, 1]], 1, 1 / 2),
        ([[1], [1], [1, 2, 3]], 2, 1),
    ],
)
def test_distinct_n_is_unique_over_all_ngrams(completions, n, share):
    assert distinct_n(completions, n) == pytest.approx(share)


@pytest.mark.parametrize("completions", [[], [[]], [[1], [2]]])
def test_distinct_n_is_0_without_ngrams(completions):
    assert distinct_n(completions, 2) == 0


def test_ngrams_do_not_span_completions():
    assert distinct_n([[1, 2], [3, 4], [1, 2]], 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_is_invariant_to_the_order_of_completions_and_to_renaming_ids(n):
    completions = [[5, 6, 5, 6, 7], [6, 5, 6], [], [7, 7, 7, 7]]
    share = distinct_n(completions, n)
    assert 0 < share < 1
    assert distinct_n(completions[::-1], n) == share
    assert distinct_n([[2 * i + 1 for i in ids] for ids in completions], n) == share


@pytest.mark.parametrize("times", [2, 5])
def test_repeating_all_completions_divides_distinct_n(times):
    completions = [[1, 2, 3], [3, 2, 4]]
    assert distinct_n(completions * times, 2) == pytest.approx(distinct_n(completions, 2) / times)


def computed(metric, *updates):
    for update in updates:
        metric.update(*update)
    return [float(value) for value in torch.stack(torch.broadcast_tensors(*_tuple(metric.compute())))]


def _tuple(values):
    return values if isinstance(values, tuple) else (values,)


def test_moments_do_not_depend_on_the_batches():
    numbers = torch.tensor([1.0, -2.0, 4.0, 4.0, 0.5])
    expected = [float(numbers.mean()), float(numbers.var(correction=0))]
    assert computed(metrics.Moments(), (numbers,)) == pytest.approx(expected)
    assert computed(metrics.Moments(), (numbers[:1],), (numbers[1:1],), (numbers[1:],)) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [metrics.Moments(), metrics.WinRate(), metrics.Perplexity()], ids=repr)
def test_metrics_are_nan_without_values(metric):
    nothing = torch.zeros(0)
    update = (nothing, nothing > 0) if isinstance(metric, metrics.Perplexity) else (nothing,)
    assert all(math.isnan(value) for value in computed(metric, update))


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_win_rate_interval_is_wilsons(wins, n, low, high):
    """Published values of the score interval."""
    outcome = torch.tensor([1.0] * wins + [0.0] * (n - wins))
    assert computed(metrics.WinRate(), (outcome,)) == pytest.approx([wins / n, low, high], abs=1e-4)


def test_win_rate_interval_contains_the_rate_and_narrows_with_more_pairs():
    few, many = (computed(metrics.WinRate(), (torch.tensor([1.0, 0.5, 0.0, 1.0]).repeat(n),)) for n in (4, 40))
    assert few[0] == many[0] == 0.625
    assert few[1] < many[1] < 0.625 < many[2] < few[2]


def test_perplexity_averages_over_tokens_not_over_texts():
    short, long = torch.log(torch.tensor([0.5])), torch.log(torch.tensor([0.25, 0.25, 0.25]))
    everywhere = [(part, torch.ones_like(part, dtype=torch.bool)) for part in (short, long)]
    assert computed(metrics.Perplexity(), *everywhere) == pytest.approx([(2 * 4**3) ** (1 / 4)])


def test_perplexity_ignores_padding():
    logprobs = torch.tensor([[-1.0, -torch.inf], [-1.0, torch.nan]])
    mask = torch.tensor([[True, False], [True, False]])
    assert computed(metrics.Perplexity(), (logprobs, mask)) == pytest.approx([math.e])
