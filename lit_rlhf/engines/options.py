"""Options of an engine that samples completions."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

from lit_rlhf.errors import InputError
from lit_rlhf.rewards.http_client import check_client, check_url


@dataclass(frozen=True)
class Engine:
    """Where completions are sampled: by the policy itself, or by a vLLM server that gets its weights.

    Attributes:
        url: Address of the server, such as `http://127.0.0.1:8000`. Without it and `start`, the policy samples itself.
        start: The command `vllm`, of any environment, to start a server on this machine for as long as the run lasts.
        arguments: Further arguments of `vllm serve`, such as `--gpu-memory-utilization=0.4`.
        environment: Further environment variables of the started server, such as `CUDA_VISIBLE_DEVICES`.
        startup_timeout: Seconds that the started server may take until it answers.
        sleep: Whether the server frees its memory of the device between rollouts (vLLM's sleep mode, level 1). A server
            of one's own needs `--enable-sleep-mode`.
        folder: Folder that both the run and the server can read, in which weights are handed over; None for shared
            memory (`/dev/shm`) or else a temporary folder, with a server on the same machine.
        timeout: Seconds that the server may take for a request.
        retries: Further attempts after a failed request.
        backoff: Seconds before the first retry, doubled before each further one, at most 60.
        concurrency: Requests at the same time; each is one prompt.
        tolerance: Largest mean difference between the server's log-probabilities and the policy's, in nats per token;
            None for 1e-3, or 0.1 where one of the two computes in 16 bits.

    Raises:
        ValueError: If a value is outside its range.
    """

    url: str | None = None
    start: str | None = None
    arguments: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    startup_timeout: float = 900.0
    sleep: bool = False
    folder: str | None = None
    timeout: float = 600.0
    retries: int = 8
    backoff: float = 1.0
    concurrency: int = 64
    tolerance: float | None = None

    def __post_init__(self) -> None:
        rules = {
            "startup_timeout": (0 < self.startup_timeout < math.inf, "above 0 seconds"),
            "timeout": (0 < self.timeout < math.inf, "above 0 seconds"),
            "retries": (self.retries >= 0, "0 or more"),
            "backoff": (0 <= self.backoff < math.inf, "0 seconds or more"),
            "concurrency": (self.concurrency >= 1, "at least 1"),
            "tolerance": (self.tolerance is None or self.tolerance > 0, "above 0"),
        }
        for name, (valid, rule) in rules.items():
            if not valid:
                raise InputError(f"engine: {name}={getattr(self, name)} must be {rule}")
        used = [name for name in ("url", "start") if getattr(self, name) is not None]
        if len(used) == 2:
            raise InputError("engine: url is a server that runs, and start starts one: give one of them")
        for name in ("arguments", "environment"):
            if getattr(self, name) and self.start is None:
                raise InputError(f"engine: {name} is for a server that the run starts: give engine.start, too")
        if self.sleep and not used:
            raise InputError("engine: sleep is for a server: give engine.url or start, too")
        if used:
            check_client(f"engine.{used[0]}")
        if self.url is not None:
            check_url(self.url, "http://127.0.0.1:8000")
        if self.start is not None and shutil.which(self.start) is None:
            raise InputError(f"engine.start={self.start!r} is no command here: give the path of `vllm`")

    @property
    def used(self) -> bool:
        """Whether a server samples."""
        return self.url is not None or self.start is not None
