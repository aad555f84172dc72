import pytest

from lit_rlhf.metrics import distinct_n


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
