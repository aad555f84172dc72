"""Figures of a comparison."""

import pytest

from lit_rlhf.comparison.plots import draw, draw_intervals


def test_figures_show_mean_curves_and_final_points(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    def result(*curves, **metrics):
        return {"seed": 1, "metrics": metrics, "curves": list(curves)}

    def validated(step, reward):
        return {"step": step, "val/reward": reward, "val/kl": step / 2, "val/judge": reward - 1}

    update = {"step": 4.0, "time/total": 5.0}  # Lightning's step 4 is the fifth update
    results = {
        "online": [result(validated(0, r), update, validated(4, r + 2), reward=9.0) for r in (0.0, 1.0)],
        "offline": [result(update, reward=0.5, judge=0.25, kl=3.0)],
        "start": [result(reward=-1.0, judge=-2.0, kl=0.0)],
        "failed": [],
    }
    monkeypatch.setattr(plt, "close", lambda figure: None)
    costs = {"start": [], "offline": [{"metrics": {"seconds": s}} for s in (0.5, 0.75, 9.0)]}
    draw(tmp_path / "curves.png", results, completions=dict.fromkeys(results, 10) | {"offline": 20}, costs=costs)
    panels = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in plt.gcf().axes]
    monkeypatch.undo()
    plt.close("all")
    assert panels == [
        {"online": [[0, 0.5], [50, 2.5]], "offline": [[100, 0.5]], "start": [[0, -1], [1, -1]]},
        {"online": [[0, 0.5], [5, 2.5]], "offline": [[3.75, 0.5]], "start": [[0, -1], [1, -1]]},
        {"online": [[0, -0.5], [2, 1.5]], "offline": [[3, 0.25]], "start": [[0, -2]]},
    ]


def test_intervals_of_the_final_test(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    def arm(*rewards, **metrics):
        return [{"seed": i, "metrics": {"reward": r, **metrics}, "curves": []} for i, r in enumerate(rewards)]

    results = {"A": arm(1.0, 3.0), "failed": [], "B": arm(5.0, kl=2.0), "diverged": arm(float("nan"), 4.0)}
    monkeypatch.setattr(plt, "close", lambda figure: None)
    draw_intervals(tmp_path / "intervals.png", results)
    axes = plt.gcf().axes
    monkeypatch.undo()
    plt.close("all")
    assert [panel.get_title() for panel in axes] == ["reward", "KL"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == list(results)
    assert axes[0].yaxis_inverted()
    lines = [line.get_xydata().tolist() for line in axes[0].lines]
    assert lines == [
        [[2, 0], [2, 1]],  # the first arm's mean, over the whole height
        [[1, 0], [3, 0]], [[2, 0]],
        [[5, 2]], [[5, 2]],
        [[4, 3]], [[4, 3]],
    ]  # fmt: skip
    (whiskers, *_), *_ = (container.lines[2] for container in axes[0].containers)
    assert whiskers.get_segments()[0].ravel().tolist() == pytest.approx([2 - 12.706, 0, 2 + 12.706, 0])
    assert (tmp_path / "intervals.png").read_bytes().startswith(b"\x89PNG")


def test_no_figure_without_a_result(tmp_path):
    draw_intervals(tmp_path / "intervals.png", {"failed": []})
    assert not list(tmp_path.iterdir())
