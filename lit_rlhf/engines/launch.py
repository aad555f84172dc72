"""A vLLM server that a run starts, and that ends with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

from lit_rlhf.engines import supervisor
from lit_rlhf.engines.options import Engine
from lit_rlhf.errors import InputError
from lit_rlhf.rewards.calls import interruptible
from lit_rlhf.rewards.http_client import ServiceError, send, short

WORKER = Path(__file__).parent / "worker"
DISTRIBUTED = ("MASTER_", "TORCHELASTIC_", "SLURM_", "PL_", "NCCL_ASYNC")
RANK = {"RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"}
"""Variables of this run's processes, which the server would take for its own."""


class StartedServer:
    """A vLLM server in a process by itself.

    Args:
        options: The command, its arguments and its environment.
        folder: The model's folder.
        log: File that its output is added to.

    Raises:
        ValueError: If it can't be started.
    """

    def __init__(self, options: Engine, folder: Path, log: Path) -> None:
        assert options.start is not None
        self.options, self.log = options, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [shutil.which(options.start) or options.start, "serve", str(folder), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--logprobs-mode", "processed_logprobs"]
        command += ["--worker-extension-cls", "lit_rlhf_worker.WeightRenewal"]
        command += ["--enable-sleep-mode"] if options.sleep else []
        command += list(options.arguments)
        inherited = {k: v for k, v in os.environ.items() if k not in RANK and not k.startswith(DISTRIBUTED)}
        own = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(WORKER)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, *command],
                env={**inherited, **own, **options.environment},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.stop = weakref.finalize(self, _stop, self._process)

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            ValueError: If it ends before, or takes too long.
        """
        end, seconds = time.monotonic() + self.options.startup_timeout, self.options.startup_timeout
        with interruptible(f"the start of the vLLM server, whose output is in {self.log}"):
            while not self._answers():
                if self._process.poll() is not None:
                    lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
                    last = next((line for line in reversed(lines) if line.strip()), "no output")
                    raise InputError(
                        f"engine.start: {self.options.start} ended with exit code {self._process.returncode} before it "
                        f"answered ({short(last)}); its output is in {self.log}"
                    )
                if time.monotonic() > end:
                    self.stop()
                    raise InputError(
                        f"engine.start: {self.options.start} did not answer within {seconds:g} s "
                        f"(engine.startup_timeout); its output is in {self.log}"
                    )
                time.sleep(0.1)

    @property
    def is_running(self) -> bool:
        """Whether its process is there, after a second in which it may end: ask when it does not answer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        return self._process.poll() is None

    @property
    def state(self) -> str:
        """What to say of it in a message."""
        code = self._process.poll()
        ended = "" if code is None else f" has ended with exit code {code}, and"
        return f"the server that the run started{ended} has its output in {self.log}"

    def _answers(self) -> bool:
        try:
            return send("GET", f"{self.url}/health", None, 5.0, self.url)[0] == 200
        except ServiceError:
            return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended
        process.stdin.write(b".")  # a fork of this process may hold the pipe open
        process.stdin.close()
    try:
        process.wait(2 * supervisor.PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
