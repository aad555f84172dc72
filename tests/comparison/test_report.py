"""Tables of a comparison."""

import math

import pytest

from comparisons import make_result
from lit_rlhf.comparison import report


def write_table(folder, results, num_seeds, contrasts=None) -> str:
    return report.write(folder, results, {}, num_seeds, contrasts or {}, dict.fromkeys(results, 1)).read_text()


def test_a_sweep_shows_the_learning_rate_with_the_best_return(tmp_path):
    returns = {"RLOO, lr 0.0001": [1.0, 3.0], "RLOO, lr 0.001": [0.0, 3.0], "DPO, lr 0.001": [-1.0, -2.0]}
    returns["RLOO, lr 0.01"] = [9.0]  # its other seed failed
    returns["RLOO, lr 0.1"] = [9.0, math.nan]
    results = {name: [make_result(seed, **{"return": r}) for seed, r in enumerate(v)] for name, v in returns.items()}
    table = report.write(tmp_path, {**results, "DPO, lr 0.0001": []}, {}, 2, {}, dict.fromkeys(results, 1))
    report.add_best_rates(table, results)
    assert table.read_text().endswith("| RLOO | 0.0001 | 2 |\n| DPO | 0.001 | -1.5 |\n")


def test_a_difference_compares_equal_seeds(tmp_path):
    results = {name: [make_result(s, **{"return": s - i}) for s in range(1 + i, 4 + i)] for i, name in enumerate("ab")}
    contrast = {"a - b": (["a"], ["b"])}
    assert write_table(tmp_path, results, 3, contrast).endswith("| a - b | 2 | 1.00 ± 0.00 |\n")
    del results["b"][0]["metrics"]["return"]
    assert write_table(tmp_path, results, 3, contrast).endswith("| a - b | 2 | 1, 1 of 2 |\n")


def test_a_contrast_compares_means_of_arms_at_the_seeds_that_all_have(tmp_path):
    rewards = {"a": [1.0, 3.0, 9.0], "b": [3.0, 7.0, 9.0], "c": [1.0, 2.0]}
    results = {n: [make_result(seed, reward=r) for seed, r in enumerate(values)] for n, values in rewards.items()}
    contrasts = {"a and b - c": (["a", "b"], ["c"]), "a - missing": (["a"], ["missing"])}
    table = write_table(tmp_path, results, 3, contrasts)
    assert table.endswith("|\n|---|---|---|\n| a and b - c | 2 | 2 ± 13 |\n")  # 1 and 3: 12.706 * 1


def test_a_column_that_is_zero_everywhere_is_left_out(tmp_path):
    rows = [make_result(i, undecided=0.0, position_bias=bias, win_rate=0.5) for i, bias in enumerate((0.0, 0.25))]
    assert write_table(tmp_path, {"a": rows}, 2).startswith("| method | seeds | win rate | position bias |\n")
    rows = [make_result(1, undecided=0.0, reward=0.0)]
    assert write_table(tmp_path, {"a": rows}, 1).startswith("| method | seeds | reward |\n")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.9, 0.95, 0.97], "0.940 ± 0.090"),
        ([1.0, -1.2, 0.5], "0.1 ± 2.9"),
        ([13.8, 13.9, 14.1], "13.9 ± 0.4"),
        ([2e-4, 4e-4, 3e-4], "0.00030 ± 0.00025"),
        ([-2e-8, 2.6e-6, 2.8e-6], "0 ± 0"),
        ([1000.0, 3000.0], "2000 ± 12706"),
        ([0.123456], "0.123"),
        ([math.inf, 1.0], "inf"),
    ],
)
def test_the_interval_determines_the_digits_of_a_mean(values, expected, tmp_path):
    results = {"a": [make_result(i, reward=value) for i, value in enumerate(values)]}
    assert write_table(tmp_path, results, len(values)).endswith(f"| a | {len(values)} | {expected} |\n")


def test_a_metric_that_some_seeds_lack_is_marked(tmp_path):
    results = {"a": [make_result(1, reward=2.0), make_result(2, reward=2.0), make_result(3)]}
    assert write_table(tmp_path, results, 3).endswith("| a | 3 | 2.00 ± 0.00, 2 of 3 |\n")


def test_every_run_has_a_row(tmp_path):
    results = {"a": [make_result(2, reward=0.5), make_result(1)], "b": []}
    write_table(tmp_path, results, 2)
    assert (tmp_path / "runs.csv").read_text().split() == ["method,seed,reward", "a,2,0.5", "a,1,nan"]
