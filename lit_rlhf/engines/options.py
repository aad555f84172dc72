"""Options of an engine that samples completions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lit_rlhf.errors import InputError
from lit_rlhf.rewards.http_client import check_client, check_url


@dataclass(frozen=True)
class Engine:
    """Where completions are sampled: by the policy itself, or by a vLLM server that gets its weights.

    Attributes:
        url: Address of the server, such as `http://127.0.0.1:8000`; None for the policy's own sampler.
        folder: Folder that both the run and the server can read, in which weights are handed over; None for shared
            memory (`/dev/shm`) or else a temporary folder, with a server on the same machine.
        timeout: Seconds that the server may take for a request.
        retries: Further attempts after a failed request.
        backoff: Seconds before the first retry, doubled before each further one, at most 60.
        concurrency: Requests at the same time; each is one prompt.
        tolerance: Largest mean difference between the server's log-probabilities and the policy's, in nats per token;
            None for 1e-3, or 0.1 where one of the two computes in 16 bits.
        importance_cap: Weigh each completion (each token, for methods with an advantage per token) by the ratio of its
            probabilities under the policy and under the server, at most this (truncated importance sampling); None for
            no correction.

    Raises:
        ValueError: If a value is outside its range.
    """

    url: str | None = None
    folder: str | None = None
    timeout: float = 600.0
    retries: int = 8
    backoff: float = 1.0
    concurrency: int = 64
    tolerance: float | None = None
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        rules = {
            "timeout": (0 < self.timeout < math.inf, "above 0 seconds"),
            "retries": (self.retries >= 0, "0 or more"),
            "backoff": (0 <= self.backoff < math.inf, "0 seconds or more"),
            "concurrency": (self.concurrency >= 1, "at least 1"),
            "tolerance": (self.tolerance is None or self.tolerance > 0, "above 0"),
            "importance_cap": (self.importance_cap is None or self.importance_cap >= 1, "at least 1"),
        }
        for name, (valid, rule) in rules.items():
            if not valid:
                raise InputError(f"engine: {name}={getattr(self, name)} must be {rule}")
        if self.url is not None:
            check_client("engine.url")
            check_url(self.url, "http://127.0.0.1:8000")
        elif self.importance_cap is not None:
            raise InputError("engine: importance_cap corrects a server's completions: give engine.url, too")
