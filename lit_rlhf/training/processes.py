"""The processes of a run wait for one another without being deaf: to signals, to a time-out, to one that is gone."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from lightning.pytorch import Trainer
from torch.distributed.distributed_c10d import default_pg_timeout

from lit_rlhf.errors import InputError

GRACE_SECONDS = 15.0
"""Seconds after which a process that was asked to stop, or whose launcher is gone, is ended."""


class ProcessLost(InputError):
    """Another process of the run has ended, or does not answer. Nothing can be done together any more."""


@dataclass(frozen=True)
class Peers:
    """What a process knows of the others of its run.

    Attributes:
        group: A gloo group of all processes: its waits can be interrupted, and it notices the end of a process.
        pids: Process ids of the others on this machine.
        seconds: How long processes wait for one another: the `timeout` of the strategy.
    """

    group: Any
    pids: tuple[int, ...]
    seconds: float

    def totals(self, values: list[float]) -> tuple[list[float], bool]:
        """Return the sums of some numbers over all processes, and whether this one had to ask the others to stop.

        Others that let this one wait for longer than `seconds` get a SIGTERM. If they still don't come, they are ended.

        Raises:
            ProcessLost: If a process has ended or had to be ended.
        """
        sums, start, asked = torch.tensor(values), time.monotonic(), 0.0
        try:
            work = torch.distributed.all_reduce(sums, group=self.group, async_op=True)
            while not work.is_completed():
                now = time.monotonic()
                if not asked and now - start > self.seconds:
                    asked = now
                    if torch.distributed.get_rank() < 2:  # one of them waits
                        print(
                            f"waited {self.seconds:g} s for another process (the timeout of trainer.strategy): all "
                            "are asked to save and stop",
                            file=sys.stderr,
                            flush=True,
                        )
                    send_signal(self.pids, signal.SIGTERM)
                elif asked and now - asked > GRACE_SECONDS:
                    atexit.register(send_signal, self.pids, signal.SIGKILL)  # the launcher would end this one, too
                    raise ProcessLost(
                        f"another process did not finish within {self.seconds:g} s of this one (the timeout of "
                        "trainer.strategy) and could not be interrupted, so it is ended; the last checkpoint resumes"
                    )
                time.sleep(min(0.02, (now - start) / 10))  # signal handlers run meanwhile
            work.wait()
        except RuntimeError as error:
            raise ProcessLost("another process of this run has ended: its own message, if any, says why") from error
        return sums.tolist(), bool(asked)


_peers: WeakKeyDictionary[Trainer, Peers] = WeakKeyDictionary()


def peers(trainer: Trainer) -> Peers:
    """Return what is known of the other processes of a run that has several. Call it on all ranks."""
    if trainer not in _peers:
        timeout: timedelta = getattr(trainer.strategy, "_timeout", None) or default_pg_timeout
        # longer than the wait, since a group whose time is up can't be used to save together
        longer = timeout + timedelta(seconds=4 * GRACE_SECONDS)
        group = torch.distributed.new_group(backend="gloo", timeout=longer)
        own = (socket.gethostname(), trainer.node_rank)
        found: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, (*own, os.getpid()), group=group)
        pids = tuple(pid for *machine, pid in found if tuple(machine) == own and pid != os.getpid())
        _peers[trainer] = Peers(group, pids, timeout.total_seconds())
        atexit.register(_leave)
        if os.getppid() in pids:
            atexit.register(_end_after, os.getppid())
            threading.Thread(target=_end_without, args=(ref(trainer), os.getppid()), daemon=True).start()
    return _peers[trainer]


def _leave() -> None:
    """Destroy the process groups, and so end their threads: one that still works while Python ends aborts the process.

    Lightning does so for NCCL alone.
    """
    _peers.clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()  # a group lives as long as a sharded model or DDP's wrapper that refers to it


def send_signal(pids: Iterable[int], number: int) -> None:
    """Send a signal to the processes that still exist."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def _end_without(trainer: ReferenceType[Trainer], launcher: int) -> None:
    """End this process if the one that started it is gone, and the run, which can't continue, has not ended by then."""
    while os.getppid() == launcher:
        time.sleep(1.0)
    time.sleep(GRACE_SECONDS)
    if (running := trainer()) is not None and running.state.status == "running":
        print(f"process {running.global_rank} ends: the one that started it is gone", file=sys.stderr, flush=True)
        os._exit(1)


def _end_after(launcher: int) -> None:
    """Let the process that started this one end first, which kills itself if it sees this one fail: its code counts."""
    end = time.monotonic() + 5.0
    while os.getppid() == launcher and time.monotonic() < end:
        time.sleep(0.05)
