import math

import pytest
import torch

from lit_rlhf.evaluation import metrics


def distinct_n(completions, n):
    metric = metrics.DistinctN(n)
    metric.update([])
    for ids in completions:  # a batch each
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
def test_different_grams_over_all_grams(completions, n, share):
    assert distinct_n(completions, n) == pytest.approx(share)


@pytest.mark.parametrize("completions", [[], [[]], [[1], [2]]])
def test_without_a_gram_it_is_zero(completions):
    assert distinct_n(completions, 2) == 0


def test_no_gram_spans_two_completions():
    assert distinct_n([[1, 2], [3, 4], [1, 2]], 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_it_is_a_share_that_neither_order_nor_the_choice_of_ids_changes(n):
    completions = [[5, 6, 5, 6, 7], [6, 5, 6], [], [7, 7, 7, 7]]
    share = distinct_n(completions, n)
    assert 0 < share < 1
    assert distinct_n(completions[::-1], n) == share
    assert distinct_n([[2 * i + 1 for i in ids] for ids in completions], n) == share


@pytest.mark.parametrize("times", [2, 5])
def test_saying_all_again_divides_it(times):
    completions = [[1, 2, 3], [3, 2, 4]]
    assert distinct_n(completions * times, 2) == pytest.approx(distinct_n(completions, 2) / times)


def computed(metric, *updates):
    for update in updates:
        metric.update(*update)
    return [float(value) for value in torch.stack(torch.broadcast_tensors(*_tuple(metric.compute())))]


def _tuple(values):
    return values if isinstance(values, tuple) else (values,)


def test_moments_are_those_of_all_numbers_whatever_the_batches():
    numbers = torch.tensor([1.0, -2.0, 4.0, 4.0, 0.5])
    expected = [float(numbers.mean()), float(numbers.var(correction=0))]
    assert computed(metrics.Moments(), (numbers,)) == pytest.approx(expected)
    assert computed(metrics.Moments(), (numbers[:1],), (numbers[1:1],), (numbers[1:],)) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [metrics.Moments(), metrics.WinRate(), metrics.Perplexity()], ids=repr)
def test_of_nothing_there_is_no_number(metric):
    nothing = torch.zeros(0)
    update = (nothing, nothing > 0) if isinstance(metric, metrics.Perplexity) else (nothing,)
    assert all(math.isnan(value) for value in computed(metric, update))


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_the_interval_is_wilsons(wins, n, low, high):
    """Against published values of the score interval."""
    outcome = torch.tensor([1.0] * wins + [0.0] * (n - wins))
    assert computed(metrics.WinRate(), (outcome,)) == pytest.approx([wins / n, low, high], abs=1e-4)


def test_the_interval_is_a_winning_rates_and_narrows():
    few, many = (computed(metrics.WinRate(), (torch.tensor([1.0, 0.5, 0.0, 1.0]).repeat(n),)) for n in (4, 40))
    assert few[0] == many[0] == 0.625
    assert few[1] < many[1] < 0.625 < many[2] < few[2]


def test_perplexity_is_that_of_a_token_not_of_a_text():
    short, long = torch.log(torch.tensor([0.5])), torch.log(torch.tensor([0.25, 0.25, 0.25]))
    everywhere = [(part, torch.ones_like(part, dtype=torch.bool)) for part in (short, long)]
    assert computed(metrics.Perplexity(), *everywhere) == pytest.approx([(2 * 4**3) ** (1 / 4)])


def test_padding_has_no_perplexity():
    logprobs = torch.tensor([[-1.0, -torch.inf], [-1.0, torch.nan]])
    mask = torch.tensor([[True, False], [True, False]])
    assert computed(metrics.Perplexity(), (logprobs, mask)) == pytest.approx([math.e])
