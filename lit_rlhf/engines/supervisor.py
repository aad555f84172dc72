"""Run a command until it ends, or until the process that started this one has: run as a file, without this package.

    python supervisor.py COMMAND...

The starting process holds the other end of the standard input, which closes with it, however it ends.
"""

import contextlib
import os
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
        os.read(sys.stdin.fileno(), 1)  # returns when the other end is closed
        signal_group(child.pid, signal.SIGTERM)
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            signal_group(child.pid, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    code = child.wait()
    signal_group(child.pid, signal.SIGKILL)  # what it has left
    return code


def signal_group(group: int, number: int) -> None:
    """Send a signal to a process group, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main())
