"""`lit-rlhf` in processes of its own, whose output goes to files, and which end with the one that started them."""

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
"""Lines of a failed process to show."""

RUNNING: set[int] = set()
"""Processes under way, each the head of a group."""


@contextlib.contextmanager
def ended_with(pool: ThreadPoolExecutor) -> Iterator[None]:
    """When told to end, drop what waits in the pool, and kill the processes under way with all their children.

    That is on Ctrl-C, SIGTERM, and where a terminal closes (SIGHUP, unless it is ignored, as under `nohup`).
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
        told = {signal.SIGTERM, *([hangup] if signal.getsignal(hangup) == signal.SIG_DFL else [])}
        before = {number: signal.signal(number, signal.default_int_handler) for number in told}
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_logged(args: list[str], log: Path, environment: dict[str, str]) -> float | None:
    """Run `lit-rlhf` in a process of its own, its output at the end of a file.

    Returns:
        The peak of its resident memory in MiB, or None where it failed.
    """
    with log.open("a", encoding="utf-8") as file:
        file.write(f"lit-rlhf {' '.join(args)}\n")
        file.flush()
        command = [sys.executable, "-m", "lit_rlhf", *args]
        given = {**os.environ, **environment}
        process = subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=given, start_new_session=True
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
    """The end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
