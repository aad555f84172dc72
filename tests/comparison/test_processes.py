"""Child processes of a comparison."""

import sys

from lit_rlhf.comparison.processes import last_lines, run_logged


def test_the_log_names_the_signal_that_killed_a_process(workspace, monkeypatch):
    (workspace / "killed").write_text("#!/bin/sh\nkill -9 $$\n")
    (workspace / "killed").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(workspace / "killed"))
    assert run_logged(["fit"], workspace / "log.txt", {}) is None
    assert last_lines(workspace / "log.txt").endswith("ended by SIGKILL (out of memory?)")
