"""Rows of similar length are padded together."""

import pytest

from lit_rlhf.models.length_groups import MAX_GROUPS, MIN_ROWS, groups_of_similar_length


def padded(groups, lengths):
    return sum(len(group) * max(lengths[i] for i in group) for group in groups)


def test_groups_hold_every_row_once_and_leave_a_quarter_of_the_padding():
    lengths = [(i * 37) % 64 + 1 for i in range(64)]
    groups = groups_of_similar_length(lengths)
    assert sorted(i for group in groups for i in group) == list(range(64))
    assert len(groups) == MAX_GROUPS and all(len(group) >= MIN_ROWS for group in groups)
    maxima, minima = zip(*((max(lengths[i] for i in g), min(lengths[i] for i in g)) for g in groups), strict=True)
    assert all(low >= high for low, high in zip(minima, maxima[1:], strict=False))
    padding = 64 * 64 - sum(lengths)
    assert padded(groups, lengths) - sum(lengths) == pytest.approx(padding / MAX_GROUPS, rel=0.1)


@pytest.mark.parametrize(
    "lengths",
    [[5] * 40, [9, 10] * 20, list(range(1, 16)), [*range(1, 4), 100], [1], [40] * 36 + [1] * 4],
    ids=["equal", "nearly equal", "few rows", "four rows", "one row", "a few short ones"],
)
def test_rows_stay_in_one_group_if_grouping_saves_little(lengths):
    assert groups_of_similar_length(lengths) == [list(range(len(lengths)))]


def test_no_rows_give_no_groups():
    assert groups_of_similar_length([]) == []
