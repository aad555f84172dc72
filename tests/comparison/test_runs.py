"""Runs of a comparison: which ones are repeated, failures, costs, interrupts."""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from itertools import accumulate

import pytest
import torch

from comparisons import SECONDS, read_table, write_config
from lit_rlhf.cli import main
from lit_rlhf.comparison import processes
from lit_rlhf.comparison.runs import run_folder, thread_limit


def test_a_failed_arm_does_not_stop_the_others_and_only_it_is_repeated(workspace, fake_runs, capsys):
    arms = {"start": {}, "broken": {"fit": ["--broken"]}, "good": {"fit": ["--good"], "test": ["--better"]}}
    write_config(workspace, arms, seeds=[1, 2], jobs=2)
    with pytest.raises(SystemExit, match=r"2 of 6 runs failed .*broken, seed"):
        main(["compare", "--config", "mine.yaml"])
    assert "what went wrong" in capsys.readouterr().out
    table = read_table(workspace)
    assert {name: row["seeds"] for name, row in table.items()} == {"start": "2", "broken": "0", "good": "2"}
    assert float(table["good"]["win_rate"]) == pytest.approx(0.15)
    assert "| broken | 0 of 2 |" in (workspace / "here" / "table.md").read_text()
    tests = [args for args, _ in fake_runs.commands if args[0] == "test" and "--better" in args]
    assert len(tests) == 2 and all("last.ckpt" in args[-1] for args in tests)
    assert all(environment == {"OMP_NUM_THREADS": "1"} for _, environment in fake_runs.commands)

    fake_runs.commands.clear()
    write_config(workspace, {**arms, "broken": {"fit": []}}, seeds=[1, 2], jobs=2)
    main(["compare", "--config", "mine.yaml"])
    assert fake_runs.names().count("fit") == 2 and read_table(workspace)["broken"]["seeds"] == "2"


def test_costs_are_measured_once_and_after_all_runs(workspace, fake_runs):
    """The first half of the updates doesn't count."""
    cost = {"fit": ["--few"], "rounds": 2}
    write_config(workspace, {"start": {}, "good": {"fit": []}}, cost=cost, pairs=[["good", "start"]], jobs=2)
    for _ in range(2):
        main(["compare", "--config", "mine.yaml"])
    measured = [environment for args, environment in fake_runs.commands if "--few" in args]
    assert measured == [{}, {}] and "--few" in fake_runs.commands[-1][0]
    table = read_table(workspace)
    assert float(table["good"]["seconds"]) == 2 and float(table["good"]["peak_mib"]) == 321
    assert table["start"]["seconds"] == "nan"
    main(["compare", "--config", "mine.yaml", "--seeds=[]", "--only=[start]"])
    assert float(read_table(workspace)["good"]["seconds"]) == 2  # measured before, so in the table
    main(["compare", "--config", "mine.yaml"])
    assert "| good - start | 1 | 0 | 0 |" in (workspace / "here" / "table.md").read_text()
    left = {path.name for path in (workspace / "here" / "cost").rglob("*")}
    assert "metrics.csv" in left and not left & {"policy", "checkpoints"}


def test_the_memory_is_that_of_the_accelerator_if_it_is_logged(workspace, fake_runs):
    fake_runs.updates = [{**update, "memory/peak_mib": 1000.0 + update["step"]} for update in fake_runs.updates]
    write_config(workspace, {"good": {"fit": []}}, seeds=[], cost={"fit": [], "rounds": 1})
    main(["compare", "--config", "mine.yaml"])
    assert float(read_table(workspace)["good"]["peak_mib"]) == 1004


def test_a_failed_measurement_is_marked(workspace, fake_runs):
    arms = {"start": {}, "broken": {"fit": ["--broken"]}, "good": {"fit": []}}
    write_config(workspace, arms, cost={"fit": [], "rounds": 2})
    with pytest.raises(SystemExit, match=r"3 of 7 runs failed .*cost of broken, round 2"):
        main(["compare", "--config", "mine.yaml"])
    rows = (workspace / "here" / "table.md").read_text().splitlines()[-3:]
    ends = [row.split(" | ")[-2:] for row in rows]
    assert ends == [["-", "- |"], ["-, 0 of 2", "-, 0 of 2 |"], ["2 (2 - 2)", "321 (321 - 321) |"]]


def test_the_cost_of_an_update_does_not_depend_on_the_logging_interval(workspace, fake_runs):
    fake_runs.updates = [{"step": 2 * i + 1, "time/total": total} for i, total in enumerate(accumulate(SECONDS))]
    write_config(workspace, {"good": {"fit": []}}, seeds=[], cost={"fit": [], "rounds": 1})
    main(["compare", "--config", "mine.yaml"])
    assert float(read_table(workspace)["good"]["seconds"]) == 1


def test_parallel_runs_share_the_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert thread_limit(1) == {} and thread_limit(3) == {"OMP_NUM_THREADS": "2"}


def test_a_result_of_other_arguments_is_refused(workspace, fake_runs, capsys):
    write_config(workspace, {"good": {"fit": []}})
    main(["compare", "--config", "mine.yaml"])
    fake_runs.commands.clear()
    write_config(workspace, {"good": {"fit": ["--model", "RAFT"]}})
    with pytest.raises(SystemExit):
        main(["compare", "--config", "mine.yaml"])
    assert re.search("good/seed-1' holds the result of other arguments .*RAFT.*--out", capsys.readouterr().err)
    assert not fake_runs.commands and read_table(workspace)["good"]["seeds"] == "1"
    write_config(workspace, {"good": {"fit": ["--model", "RAFT"]}, "other": {"fit": []}})
    with pytest.raises(SystemExit):  # even if only the other one should run: they share a table
        main(["compare", "--config", "mine.yaml", "--only", "[other]"])
    assert not fake_runs.commands


def test_an_arm_whose_test_failed_is_not_trained_again(workspace, fake_runs, capsys):
    for failing in (["--broken"], ["--silent"], []):
        write_config(workspace, {"good": {"fit": ["--good"], "test": failing}})
        ended = pytest.raises(SystemExit, match="1 of 1 runs failed") if failing else contextlib.nullcontext()
        with ended:
            main(["compare", "--config", "mine.yaml"])
    assert fake_runs.names() == ["fit", "test", "test", "test"]
    log = run_folder(workspace / "here", "good", 1) / "log.txt"
    assert log.read_text().startswith("fit:"), "the log keeps the output of the training"
    assert "metrics.csv holds no result of the test" in capsys.readouterr().out


def test_an_arm_trained_with_other_arguments_is_trained_again(workspace, fake_runs):
    for fit in (["--good"], ["--better"]):
        write_config(workspace, {"good": {"fit": fit, "test": ["--broken"]}})
        with pytest.raises(SystemExit):
            main(["compare", "--config", "mine.yaml"])
    assert fake_runs.names() == ["fit", "test"] * 2


def test_an_arm_without_its_checkpoint_is_trained_again(workspace, fake_runs):
    for broken in (["--broken"], []):
        write_config(workspace, {"good": {"fit": [], "test": broken}})
        with pytest.raises(SystemExit) if broken else contextlib.nullcontext():
            main(["compare", "--config", "mine.yaml"])
        for path in workspace.rglob("last.ckpt"):
            path.unlink()
    assert fake_runs.names() == ["fit", "test"] * 2


@pytest.mark.parametrize("name", ["trained.json", "result.json"])
@pytest.mark.parametrize("content", ["", '{"seed": 1, "argu'])
def test_a_record_that_was_cut_off_is_as_none(name, content, workspace, fake_runs):
    write_config(workspace, {"good": {"fit": [], "test": ["--broken"] if name == "trained.json" else []}})
    with pytest.raises(SystemExit) if name == "trained.json" else contextlib.nullcontext():
        main(["compare", "--config", "mine.yaml"])
    (run_folder(workspace / "here", "good", 1) / name).write_text(content)
    write_config(workspace, {"good": {"fit": []}})
    main(["compare", "--config", "mine.yaml"])
    assert read_table(workspace)["good"]["seeds"] == "1"
    assert fake_runs.names() == ["fit", "test", *(["fit", "test"] if name == "trained.json" else ["test"])]


def test_a_run_without_metrics_counts_as_failed(workspace, fake_runs):
    write_config(workspace, {"start": {}, "untested": {"test": ["--silent"]}})
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed \(untested, seed 1\)"):
        main(["compare", "--config", "mine.yaml"])
    assert read_table(workspace)["start"]["seeds"] == "1"


def test_an_interrupt_ends_the_processes_and_leaves_no_result(workspace, unchecked, monkeypatch, capsys):
    """An endless run is interrupted; the pending one doesn't start."""
    monkeypatch.setattr(sys, "executable", str(workspace / "endless"))
    (workspace / "endless").write_text("#!/bin/sh\n(while true; do touch $0.beats; sleep 0.1; done) &\nwait\n")
    (workspace / "endless").chmod(0o755)
    write_config(workspace, {"one": {"fit": []}, "two": {"fit": []}})

    def interrupt():
        while not beats.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    beats = workspace / "endless.beats"
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", "mine.yaml"])
    assert stopped.value.code == 130 and "the same command resumes" in capsys.readouterr().err
    beats.unlink()
    time.sleep(0.5)
    assert not processes.RUNNING and not beats.exists()
    assert [path.name for path in (workspace / "here").glob("*/*/*")] == ["log.txt"]
    assert not (workspace / "here" / "two").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_arms_run_in_processes_and_fail_independently(workspace, capsys):
    raft = {"fit": ["--model", "RAFT"]}
    write_config(workspace, {"start": {}, "broken": {"fit": ["--model.num_samples", "1"]}, "RAFT k=4": raft})
    with pytest.raises(SystemExit, match=r"1 of 3 runs failed \(broken, seed 1\)"):
        main(["compare", "--config", "mine.yaml"])
    assert "num_samples=1 must be at least 2" in capsys.readouterr().out
    table = read_table(workspace)
    assert {name: row["seeds"] for name, row in table.items()} == {"start": "1", "broken": "0", "RAFT k=4": "1"}
    assert float(table["start"]["win_rate"]) == 0.5 and abs(float(table["start"]["kl"])) < 1e-4
    assert "| broken | 0 of 1 |" in (workspace / "here" / "table.md").read_text()
    assert (workspace / "here" / "curves.png").stat().st_size > 10_000

    done = workspace / "here" / "RAFT-k-4" / "seed-1" / "result.json"
    marked = {**json.loads(done.read_text()), "metrics": {"win_rate": 0.125}}  # would be lost if it ran again
    done.write_text(json.dumps(marked))
    arms = {"start": {}, "broken": {"fit": []}, "RAFT k=4": raft}
    cost = {"fit": ["--trainer.max_steps", "4", "--trainer.limit_val_batches", "0"], "rounds": 1}
    write_config(workspace, arms, cost=cost, pairs=[["RAFT k=4", "start"]], jobs=2)
    main(["compare", "--config", "mine.yaml"])
    table = read_table(workspace)
    assert table["broken"]["seeds"] == "1" and table["RAFT k=4"]["win_rate"] == "0.125"
    assert "| RAFT k=4 - start | 1 | -0.375 |" in (workspace / "here" / "table.md").read_text()
    for name in ("broken", "RAFT k=4"):
        assert 0 < float(table[name]["seconds"]) < 60 and 100 < float(table[name]["peak_mib"]) < 10_000
    assert table["start"]["seconds"] == "nan"
