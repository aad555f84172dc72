"""A comparison from its command to its table, with cells that last a moment."""

import contextlib
import csv
import json
import math
import os
import re
import signal
import sys
import threading
import time
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import yaml

from lit_rlhf.cli.main import CONFIGS, main
from lit_rlhf.comparison import processes, report
from lit_rlhf.comparison import runs as compare
from lit_rlhf.comparison.runs import Cell, cell_folder, sweep

TINY = ["--config", "quickstart", "--data.train_size", "16", "--data.val_size", "4", "--data.batch_size", "4"]
SHORT = ["--model.max_new_tokens", "4", "--trainer.max_steps", "1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def write_config(place, cells, **options):
    given = {"out": "here", "seeds": [1], "common": [*TINY, *SHORT], "evaluation": [*TINY, *SHORT[:2]], "cells": cells}
    (place / "mine.yaml").write_text(yaml.safe_dump({**given, **options}, sort_keys=False))


def read_table(place) -> dict[str, dict[str, str]]:
    with (place / "here" / "table.csv").open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.fixture
def quick(monkeypatch):
    """Cells that leave their files at once: a run of `fit` two updates, a run of `test` one row; `--broken` fails."""
    asked = []

    def run_logged(args, log, environment):
        asked.append((args, environment))
        with log.open("a") as file:
            file.write(f"{args[0]}: what went wrong\n")
        if "--broken" in args:
            return None
        root = Path(args[args.index("--trainer.default_root_dir") + 1])
        folder = root / f"version_{len(list(root.glob('version_*')))}"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "last.ckpt").touch()
        (root / "policy" / "last").mkdir(parents=True, exist_ok=True)
        seed = float(args[args.index("--seed_everything") + 1])
        rows = [{"test/win_rate": seed / 10, "test/return": seed}] if args[0] == "test" else UPDATES
        write_csv(folder / "metrics.csv", [] if "--silent" in args else rows)
        return 321.0

    monkeypatch.setattr(compare, "run_logged", run_logged)
    monkeypatch.setattr(compare, "check_arguments", lambda runs: None)
    return asked


SECONDS = [9.0, 9.0, 1.0, 3.0, 2.0]
UPDATES = [{"step": i, "time/total": total} for i, total in enumerate(accumulate(SECONDS))]


def write_csv(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["step"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def test_a_cell_that_fails_does_not_stop_the_others_and_only_it_is_run_again(place, quick, capsys):
    cells = {"start": {}, "broken": {"fit": ["--broken"]}, "good": {"fit": ["--good"], "test": ["--better"]}}
    write_config(place, cells, seeds=[1, 2], jobs=2)
    with pytest.raises(SystemExit, match=r"2 of 6 cells failed .*broken, seed"):
        main(["compare", "--config", "mine.yaml"])
    assert "what went wrong" in capsys.readouterr().out
    table = read_table(place)
    assert {name: row["seeds"] for name, row in table.items()} == {"start": "2", "broken": "0", "good": "2"}
    assert float(table["good"]["win_rate"]) == pytest.approx(0.15)
    assert "| broken | 0 of 2 |" in (place / "here" / "table.md").read_text()
    tests = [args for args, _ in quick if args[0] == "test" and "--better" in args]
    assert len(tests) == 2 and all("last.ckpt" in args[-1] for args in tests)
    assert all(environment == {"OMP_NUM_THREADS": "1"} for _, environment in quick)  # of the one that tests have

    quick.clear()
    write_config(place, {**cells, "broken": {"fit": []}}, seeds=[1, 2], jobs=2)
    main(["compare", "--config", "mine.yaml"])
    assert [args[0] for args, _ in quick].count("fit") == 2 and read_table(place)["broken"]["seeds"] == "2"


def test_costs_are_measured_after_all_else_and_once(place, quick):
    """The first half of the updates does not count."""
    cost = {"fit": ["--few"], "rounds": 2}
    write_config(place, {"start": {}, "good": {"fit": []}}, cost=cost, pairs=[["good", "start"]], jobs=2)
    for _ in range(2):
        main(["compare", "--config", "mine.yaml"])
    measured = [environment for args, environment in quick if "--few" in args]
    assert measured == [{}, {}] and "--few" in quick[-1][0]
    table = read_table(place)
    assert float(table["good"]["seconds"]) == 2 and float(table["good"]["peak_mib"]) == 321
    assert table["start"]["seconds"] == "nan"
    main(["compare", "--config", "mine.yaml", "--seeds=[]", "--only=[start]"])
    assert float(read_table(place)["good"]["seconds"]) == 2  # measured before, so in the table
    main(["compare", "--config", "mine.yaml"])
    assert "| good - start | 1 | 0 | 0 |" in (place / "here" / "table.md").read_text()
    left = {path.name for path in (place / "here" / "cost").rglob("*")}
    assert "metrics.csv" in left and not left & {"policy", "checkpoints"}


def test_memory_is_that_of_the_accelerator_where_there_is_one(place, quick, monkeypatch):
    memory = [{**update, "memory/peak_mib": 1000.0 + update["step"]} for update in UPDATES]
    monkeypatch.setattr(sys.modules[__name__], "UPDATES", memory)
    write_config(place, {"good": {"fit": []}}, seeds=[], cost={"fit": [], "rounds": 1})
    main(["compare", "--config", "mine.yaml"])
    assert float(read_table(place)["good"]["peak_mib"]) == 1004


def test_a_cost_that_could_not_be_measured_is_marked(place, quick):
    cells = {"start": {}, "broken": {"fit": ["--broken"]}, "good": {"fit": []}}
    write_config(place, cells, cost={"fit": [], "rounds": 2})
    with pytest.raises(SystemExit, match=r"3 of 7 cells failed .*cost of broken, round 2"):
        main(["compare", "--config", "mine.yaml"])
    rows = (place / "here" / "table.md").read_text().splitlines()[-3:]
    ends = [row.split(" | ")[-2:] for row in rows]
    assert ends == [["-", "- |"], ["-, 0 of 2", "-, 0 of 2 |"], ["2 (2 - 2)", "321 (321 - 321) |"]]


def test_a_cost_is_that_of_an_update_however_often_it_is_logged(place, quick, monkeypatch):
    seldom = [{"step": 2 * i + 1, "time/total": total} for i, total in enumerate(accumulate(SECONDS))]
    monkeypatch.setattr(sys.modules[__name__], "UPDATES", seldom)
    write_config(place, {"good": {"fit": []}}, seeds=[], cost={"fit": [], "rounds": 1})
    main(["compare", "--config", "mine.yaml"])
    assert float(read_table(place)["good"]["seconds"]) == 1


def test_cells_at_a_time_share_the_threads_that_there_are(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert compare.threads(1) == {} and compare.threads(3) == {"OMP_NUM_THREADS": "2"}


def test_a_trained_cell_whose_checkpoint_is_gone_is_trained_again(place, quick):
    for broken in (["--broken"], []):
        write_config(place, {"good": {"fit": [], "test": broken}})
        with pytest.raises(SystemExit) if broken else contextlib.nullcontext():
            main(["compare", "--config", "mine.yaml"])
        for path in place.rglob("last.ckpt"):
            path.unlink()
    assert [args[0] for args, _ in quick] == ["fit", "test"] * 2


def test_a_process_that_was_killed_says_so(place, monkeypatch):
    (place / "killed").write_text("#!/bin/sh\nkill -9 $$\n")
    (place / "killed").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(place / "killed"))
    assert processes.run_logged(["fit"], place / "log.txt", {}) is None
    assert processes.last_lines(place / "log.txt").endswith("ended by SIGKILL (out of memory?)")


def test_a_sweep_runs_every_rate_and_nothing_else(place, quick):
    write_config(place, {"start": {}, "good": {"fit": []}}, cost={"fit": ["--few"]})
    main(["compare", "--config", "mine.yaml", "--rates", "[1e-6, 1e-5, 1e-4]"])
    rates = [args[args.index("--model.optimizer.lr") + 1] for args, _ in quick if args[0] == "fit"]
    assert rates == ["1e-06", "1e-05", "0.0001"]
    assert "| good | 1e-06 | 1 |" in (place / "here" / "table.md").read_text()


def test_a_result_of_other_arguments_is_not_taken_for_this_ones(place, quick, capsys):
    write_config(place, {"good": {"fit": []}})
    main(["compare", "--config", "mine.yaml"])
    quick.clear()
    write_config(place, {"good": {"fit": ["--model", "RAFT"]}})
    with pytest.raises(SystemExit):
        main(["compare", "--config", "mine.yaml"])
    assert re.search("good/seed-1' holds the result of other arguments .*RAFT.*--out", capsys.readouterr().err)
    assert not quick and read_table(place)["good"]["seeds"] == "1"
    write_config(place, {"good": {"fit": ["--model", "RAFT"]}, "other": {"fit": []}})
    with pytest.raises(SystemExit):  # nor where only another one is to be run: they stand in one table
        main(["compare", "--config", "mine.yaml", "--only", "[other]"])
    assert not quick


def test_a_cell_whose_test_failed_is_not_trained_again(place, quick, capsys):
    for failing in (["--broken"], ["--silent"], []):
        write_config(place, {"good": {"fit": ["--good"], "test": failing}})
        ended = pytest.raises(SystemExit, match="1 of 1 cells failed") if failing else contextlib.nullcontext()
        with ended:
            main(["compare", "--config", "mine.yaml"])
    assert [args[0] for args, _ in quick] == ["fit", "test", "test", "test"]
    log = cell_folder(place / "here", "good", 1) / "log.txt"
    assert log.read_text().startswith("fit:"), "what was said in training is kept with it"
    assert "metrics.csv holds no result of the test" in capsys.readouterr().out


def test_what_was_trained_with_other_arguments_is_trained_again(place, quick):
    for fit in (["--good"], ["--better"]):
        write_config(place, {"good": {"fit": fit, "test": ["--broken"]}})
        with pytest.raises(SystemExit):
            main(["compare", "--config", "mine.yaml"])
    assert [args[0] for args, _ in quick] == ["fit", "test"] * 2


def test_an_option_that_does_not_exist_is_found_before_any_cell_has_run(place, capsys):
    write_config(place, {"good": {"fit": []}, "typo": {"fit": ["--model.num_sample", "4"]}})
    with pytest.raises(SystemExit):
        main(["compare", "--config", "mine.yaml"])
    assert re.search("the cell 'typo': lit-rlhf fit does not take (?s:.*)'num_sample'", capsys.readouterr().err)
    assert not (place / "here").exists()


@pytest.mark.parametrize("name", ["testbed", "sweep", "ablations", "cost", "reviews"])
def test_the_command_line_takes_every_cell_of_a_shipped_comparison(name, place, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "run_all", lambda runs, run_one, jobs: asked.extend(runs) or [])
    main(["compare", "--config", f"paper/{name}", *(["--rates", "[1e-3]"] if name == "sweep" else [])])
    cells = yaml.safe_load((CONFIGS / "paper" / f"{name}.yaml").read_text())["cells"]
    assert {run.cell.partition(", lr")[0] for run in asked} == set(cells)


def test_an_interrupt_ends_the_processes_and_leaves_no_result(place, monkeypatch, capsys):
    """A cell that never ends by itself is interrupted; the one that waits behind it is not begun."""
    monkeypatch.setattr(compare, "check_arguments", lambda runs: None)
    monkeypatch.setattr(sys, "executable", str(place / "endless"))
    (place / "endless").write_text("#!/bin/sh\n(while true; do touch $0.beats; sleep 0.1; done) &\nwait\n")
    (place / "endless").chmod(0o755)
    write_config(place, {"one": {"fit": []}, "two": {"fit": []}})

    def interrupt():
        while not beats.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    beats = place / "endless.beats"
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", "mine.yaml"])
    assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    beats.unlink()
    time.sleep(0.5)
    assert not processes.RUNNING and not beats.exists()
    assert [path.name for path in (place / "here").glob("*/*/*")] == ["log.txt"]
    assert not (place / "here" / "two").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cells_are_processes_that_fail_one_by_one(place, capsys):
    raft = {"fit": ["--model", "RAFT"]}
    write_config(place, {"start": {}, "broken": {"fit": ["--model.num_samples", "1"]}, "RAFT k=4": raft})
    with pytest.raises(SystemExit, match=r"1 of 3 cells failed \(broken, seed 1\)"):
        main(["compare", "--config", "mine.yaml"])
    told = capsys.readouterr().out
    assert "num_samples=1 must be at least 2" in told
    table = read_table(place)
    assert {name: row["seeds"] for name, row in table.items()} == {"start": "1", "broken": "0", "RAFT k=4": "1"}
    assert float(table["start"]["win_rate"]) == 0.5 and abs(float(table["start"]["kl"])) < 1e-4
    assert "| broken | 0 of 1 |" in (place / "here" / "table.md").read_text()
    assert (place / "here" / "curves.png").stat().st_size > 10_000

    done = place / "here" / "RAFT-k-4" / "seed-1" / "result.json"
    marked = {**json.loads(done.read_text()), "metrics": {"win_rate": 0.125}}  # would be lost if it ran again
    done.write_text(json.dumps(marked))
    cells = {"start": {}, "broken": {"fit": []}, "RAFT k=4": raft}
    cost = {"fit": ["--trainer.max_steps", "4", "--trainer.limit_val_batches", "0"], "rounds": 1}
    write_config(place, cells, cost=cost, pairs=[["RAFT k=4", "start"]], jobs=2)
    main(["compare", "--config", "mine.yaml"])
    table = read_table(place)
    assert table["broken"]["seeds"] == "1" and table["RAFT k=4"]["win_rate"] == "0.125"
    assert "| RAFT k=4 - start | 1 | -0.375 |" in (place / "here" / "table.md").read_text()
    for name in ("broken", "RAFT k=4"):
        assert 0 < float(table[name]["seconds"]) < 60 and 100 < float(table[name]["peak_mib"]) < 10_000
    assert table["start"]["seconds"] == "nan"


def test_a_cell_that_leaves_nothing_to_read_is_one_that_failed(place, quick):
    write_config(place, {"start": {}, "untested": {"test": ["--silent"]}})
    with pytest.raises(SystemExit, match=r"1 of 2 cells failed \(untested, seed 1\)"):
        main(["compare", "--config", "mine.yaml"])
    assert read_table(place)["start"]["seeds"] == "1"


def test_only_what_is_asked_for_is_run(place, quick):
    write_config(place, {"one": {}, "two": {}})
    main(["compare", "--config", "mine.yaml", "--only", "[two]"])
    assert not cell_folder(place / "here", "one", 1).exists()
    assert list(read_table(place)) == ["two"]


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--only=[three]", "three.*the cells are one"),
        ("--pairs=[[one, four]]", "four.*the cells are one"),
        ("--seeds=[]", "seeds"),
        ("--seeds=[1, 2, 1]", "one of them stands twice"),
        ("--jobs=0", "jobs=0"),
        ("--cells={}", "0 cells"),
        ("--cells={k=1: {}, k 1: {}}", "'k=1' and 'k 1' would write into one folder"),
        ("--cost={fit: [], rounds: 0}", "cost.rounds=0 must be at least 1"),
        ("--rates=[1e-4]", "0 cells"),
        (["--rates=[1e-4]", "--only=[one]", "--cells={one: {}, two: {fit: []}}"], "0 cells"),
        ("--rates=[0, -1e-4]", r"rates=\[0.0, -0.0001\] must be above 0"),
    ],
)
def test_what_can_not_be_compared_is_a_sentence(option, sentence, place, capsys):
    write_config(place, {"one": {}})
    with pytest.raises(SystemExit):
        main(["compare", "--config", "mine.yaml", *([option] if isinstance(option, str) else option)])
    assert re.search(sentence, capsys.readouterr().err)


def test_a_sweep_gives_every_method_every_rate_and_says_which_is_best(tmp_path):
    cells = {"SFT": Cell(), "RLOO": Cell(fit=[]), "DPO": Cell(fit=["--model", "DPO"], test=["--x"])}
    swept = sweep(cells, [1e-4, 1e-3])
    assert list(swept) == ["RLOO, lr 0.0001", "RLOO, lr 0.001", "DPO, lr 0.0001", "DPO, lr 0.001"]
    assert swept["DPO, lr 0.001"] == Cell(fit=["--model", "DPO", "--model.optimizer.lr", "0.001"], test=["--x"])
    returns = {"RLOO, lr 0.0001": [1.0, 3.0], "RLOO, lr 0.001": [0.0, 3.0], "DPO, lr 0.001": [-1.0, -2.0]}
    returns["RLOO, lr 0.01"] = [9.0]  # where the other seed failed
    results = {name: [fabricated(seed, r) for seed, r in enumerate(values)] for name, values in returns.items()}
    table = report.write(tmp_path, {**results, "DPO, lr 0.0001": []}, {}, 2, (), 1)
    report.add_best_rates(table, results)
    assert table.read_text().endswith("| RLOO | 0.0001 | 2 |\n| DPO | 0.001 | -1.5 |\n")


def fabricated(seed, value):
    return {"seed": seed, "metrics": {"return": value}, "curves": []}


def test_a_difference_is_that_of_equal_seeds(tmp_path):
    results = {"a": [fabricated(s, float(s)) for s in (1, 2, 3)], "b": [fabricated(s, s - 1.0) for s in (2, 3, 4)]}
    table = report.write(tmp_path, results, {}, 3, [("a", "b")], 1).read_text()
    assert table.endswith("| a - b | 2 | 1.00 ± 0.00 |\n")
    del results["b"][0]["metrics"]["return"]
    assert report.write(tmp_path, results, {}, 3, [("a", "b")], 1).read_text().endswith("| a - b | 2 | 1, 1 of 2 |\n")


def test_a_mean_over_seeds_is_that_of_the_same_updates():
    rows = [{"step": step, "val/reward": float(step), "val/kl": 1.0, "val/judge": 2.0} for step in (0, 2, 4)]
    courses = [report.validation_curve(some) for some in (with_steps(rows), with_steps(rows[:1] + rows[2:]))]
    assert [(p["step"], p["reward"]) for p in report.mean_validation_curve(courses)] == [(0, 0), (4, 4)]


def with_steps(validations):
    """Rows as a logger writes them: what was trained before each validation."""
    return [row for v in validations for row in ({"step": v["step"] - 1, "time/total": float(v["step"])}, v)]


def test_pictures_show_means_of_validations_and_ends_of_what_has_none(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    def result(*curves, **metrics):
        return {"seed": 1, "metrics": metrics, "curves": list(curves)}

    def validated(step, reward):
        return {"step": step, "val/reward": reward, "val/kl": step / 2, "val/judge": reward - 1}

    took = {"step": 4.0, "time/total": 5.0}  # what Lightning calls step 4 is the fifth update
    results = {
        "online": [result(validated(0, r), took, validated(4, r + 2), reward=9.0) for r in (0.0, 1.0)],
        "offline": [result(took, reward=0.5, judge=0.25, kl=3.0)],
        "start": [result(reward=-1.0, judge=-2.0, kl=0.0)],
        "failed": [],
    }
    monkeypatch.setattr(plt, "close", lambda figure: None)
    costs = {"start": [], "offline": [{"metrics": {"seconds": s}} for s in (0.5, 0.75, 9.0)]}
    report.draw(tmp_path / "curves.png", results, completions=10, costs=costs)
    panels = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in plt.gcf().axes]
    monkeypatch.undo()
    plt.close("all")
    assert panels == [
        {"online": [[0, 0.5], [50, 2.5]], "offline": [[50, 0.5]], "start": [[0, -1], [1, -1]]},
        {"online": [[0, 0.5], [5, 2.5]], "offline": [[3.75, 0.5]], "start": [[0, -1], [1, -1]]},
        {"online": [[0, -0.5], [2, 1.5]], "offline": [[3, 0.25]], "start": [[0, -2]]},
    ]


def test_where_a_judge_only_compares_its_win_rate_is_drawn():
    row = {"step": 0, "val/reward": 1.0, "val/kl": 2.0, "val/win_rate": 0.75}
    assert report.validation_curve([row])[0]["judge"] == 0.75
    assert report.end({"metrics": {"win_rate": 0.5}, "curves": []})["judge"] == 0.5


def test_a_column_stands_where_there_is_something_to_see(tmp_path):
    rows = [{"undecided": 0.0, "position_bias": bias, "win_rate": 0.5} for bias in (0.0, 0.25)]
    results = {"a": [{"seed": i, "metrics": row, "curves": []} for i, row in enumerate(rows)]}
    table = report.write(tmp_path, results, {}, 2, (), 1).read_text()
    assert table.startswith("| method | seeds | win rate | position bias |\n")
    nothing = {"a": [{"seed": 1, "metrics": {"undecided": 0.0, "reward": 0.0}, "curves": []}]}
    assert report.write(tmp_path, nothing, {}, 1, (), 1).read_text().startswith("| method | seeds | reward |\n")


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
def test_a_mean_has_the_digits_that_its_interval_leaves_it(values, expected, tmp_path):
    results = {"a": [{"seed": i, "metrics": {"reward": value}, "curves": []} for i, value in enumerate(values)]}
    table = report.write(tmp_path, results, {}, len(values), (), 1).read_text()
    assert table.endswith(f"| a | {len(values)} | {expected} |\n")


def test_a_metric_that_some_seeds_lack_is_marked(tmp_path):
    results = {"a": [fabricated(1, 2.0), fabricated(2, 2.0), {"seed": 3, "metrics": {}, "curves": []}]}
    assert report.write(tmp_path, results, {}, 3, (), 1).read_text().endswith("| a | 3 | 2.00 ± 0.00, 2 of 3 |\n")


def test_the_interval_is_students(tmp_path):
    mean, half = report.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.303 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-3)
    assert math.isnan(report.interval([1.0])[1])
    table = {15: 2.131, 16: 2.120, 20: 2.086, 30: 2.042, 120: 1.980}  # of any book
    assert {freedom: round(report.student_t(freedom), 3) for freedom in table} == pytest.approx(table, abs=1.1e-3)


def test_every_cell_of_the_paper_names_a_method_and_as_many_completions():
    """Updates times completions of a rollout; a pair is two completions."""
    config = yaml.safe_load((CONFIGS / "paper" / "testbed.yaml").read_text())
    quickstart = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    for name, given in config["cells"].items():
        fit = given.get("fit", [])
        options = dict(zip(fit[::2], fit[1::2], strict=True))
        samples = options.get("--model.num_samples", quickstart["model"]["init_args"]["num_samples"])
        rows = options.get("--data.batch_size", quickstart["data"]["init_args"]["batch_size"])
        assert int(rows) * (2 if name == "DPO" else int(samples)) == 128, name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_cells_of_the_paper_run(place):
    config = yaml.safe_load((CONFIGS / "paper" / "testbed.yaml").read_text())
    small = ["--data.train_size", "16", "--data.val_size", "4", "--data.batch_size", "4", "--trainer.max_steps", "1"]
    cells = {}
    for name, given in config["cells"].items():
        shorter = SHORT[:2] if name != "DPO" else []  # it samples nothing
        cells[name] = {**given, "fit": [*given["fit"], *small, *shorter]} if "fit" in given else given
    evaluation = [*config["evaluation"], "--data.val_size", "4"]
    write_config(place, cells, common=config["common"], evaluation=evaluation)
    main(["compare", "--config", "mine.yaml"])
    table = read_table(place)
    assert {row["seeds"] for row in table.values()} == {"1"} and len(table) == len(config["cells"]) == 10
    assert all(math.isfinite(float(row["win_rate"])) for row in table.values())
