"""Child processes of `lit-rlhf`: output goes to log files, and an interrupt of their parent ends them all."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LAST_LINES = 15
"""Number of log lines to show of a failed process."""

RUNNING: set[int] = set()
"""Ids of the running processes, each the leader of a process group."""


@contextlib.contextmanager
def kill_on_interrupt(pool: ThreadPoolExecutor) -> Iterator[None]:
    """On an interrupt, cancel the pool's pending work and kill the running processes with all their children.

    Ctrl-C, SIGTERM and a closed terminal (SIGHUP, unless ignored, as under `nohup`) are interrupts.
    """
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
        interrupts = {signal.SIGTERM, *([hangup] if signal.getsignal(hangup) == signal.SIG_DFL else [])}
        previous = {number: signal.signal(number, signal.default_int_handler) for number in interrupts}
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_logged(args: list[str], log: Path, environment: dict[str, str]) -> float | None:
    """Run `lit-rlhf` in a child process and append its output to a file.

    Returns:
        Its peak resident memory in MiB, or None if it failed.
    """
    with log.open("a", encoding="utf-8") as file:
        file.write(f"lit-rlhf {' '.join(args)}\n")
        file.flush()
        command = [sys.executable, "-m", "lit_rlhf", *args]
        variables = {**os.environ, **environment}
        process = subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=variables, start_new_session=True
        )
        RUNNING.add(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        RUNNING.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            file.write(f"ended by {name}{' (out of memory?)' * (name == 'SIGKILL')}\n")
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss / unit if process.returncode == 0 else None


def last_lines(log: Path) -> str:
    """Return the end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
