"""Run a command until it ends, or until the process that started this one has: run as a file, without this package.

    python supervisor.py COMMAND...

The starting process holds the other end of the standard input. The command ends when something is written there, when
it is closed, or when that process is gone, however it ended.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading

PATIENCE = 10.0
"""Seconds between the request to end and SIGKILL."""


def main() -> int:
    """Run the command in a process group by itself, all of which ends here; return the command's exit code."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def end_with_parent() -> None:
        parent = os.getppid()
        while os.getppid() == parent and not select.select([sys.stdin], [], [], 1.0)[0]:
            pass
        signal_group(child.pid, signal.SIGTERM)
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            signal_group(child.pid, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    code = child.wait()
    signal_group(child.pid, signal.SIGKILL)  # what it has left
    return code if code >= 0 else 128 - code  # of a signal, as a shell has it


def signal_group(group: int, number: int) -> None:
    """Send a signal to a process group, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main())
