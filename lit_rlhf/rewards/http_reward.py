"""A reward that a server computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lit_rlhf.errors import InputError
from lit_rlhf.rewards.guard import Guarded
from lit_rlhf.rewards.http_client import Answer, ServiceError, check_client, check_url, read_key, send, short, without
from lit_rlhf.types import Text


class HTTPReward:
    """The scores that a server returns.

    Each request is a POST of `{"prompts": [...], "completions": [...], "columns": {"answer": [...]}}` in JSON, with one
    entry per completion. Prompts and completions are strings, or lists of messages. The answer is
    `{"scores": [0.5, null, ...]}`, with null for no opinion. Failures are treated as by `Guarded`: connection errors,
    429, 5xx and slow answers are retried; other statuses and invalid answers only once the server has answered well.

    Args:
        url: Address of the server, such as `http://localhost:8000/score`.
        columns: Columns of the data to send; only these leave the machine.
        batch_size: Completions per request.
        concurrency: Requests at the same time.
        timeout: Seconds that the server may take for a request.
        retries: Further attempts after a failed request.
        backoff: Seconds before the first retry, doubled before each further one. A longer `Retry-After` of the server
            has precedence. At most 60 in any case.
        max_failures: Number of calls in a row without any answer that stops the run.
        api_key_env: Name of an environment variable with an API key, sent as `Authorization: Bearer ...`. The key
            itself is in no configuration and no message.

    Raises:
        ValueError: If the URL is not an HTTP address or holds a user, the environment variable is not set or no key,
            or a number is out of its range.
        ImportError: If the package httpx2 is not installed.
    """

    def __init__(
        self,
        url: str,
        columns: Sequence[str] = (),
        batch_size: int = 32,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        max_failures: int = 3,
        api_key_env: str | None = None,
    ) -> None:
        check_client("HTTPReward")
        self._shown = check_url(url, "http://localhost:8000/score")
        if isinstance(columns, str):
            raise InputError(f"columns={columns!r} must be a list of columns: put it in brackets")
        if not 0 < timeout < float("inf"):
            raise InputError(f"timeout={timeout} of HTTPReward must be above 0 seconds")
        self.guard = Guarded(self, None, retries, backoff, max_failures, batch_size, concurrency)
        self.url, self.timeout, self.api_key_env = url, timeout, api_key_env
        self.required_columns = tuple(columns)
        read_key(self.api_key_env, "HTTPReward")

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        """Send one request, and return one score per completion.

        Raises:
            RuntimeError: If the server does not return scores.
            ValueError: If a column can't be sent as JSON.
        """
        sent = {name: columns[name] for name in self.required_columns}
        body = {"prompts": prompts, "completions": completions, "columns": sent}
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ServiceError(f"{self._shown}: the request is not JSON: {error}; see columns", retry=False) from error
        key = read_key(self.api_key_env, "HTTPReward")
        return self._read(send("POST", self.url, content, self.timeout, self._shown, key), len(completions), key)

    def _read(self, answer: Answer, count: int, key: str) -> list[float | None]:
        answer.check_status(self._shown)
        try:
            scores = json.loads(answer.text)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            scores = None
        if not isinstance(scores, list):
            problem = 'which is not JSON of the form {"scores": [...]}'
        elif len(scores) != count:
            problem = f"which has {len(scores)} scores for {count} completions"
        elif wrong := [score for score in scores if not _is_score(score)]:
            problem = f"where {short(without(repr(wrong[0]), key))} is neither a finite number nor null"
        else:
            return scores
        raise ServiceError(f"{self._shown} answered {answer.excerpt}, {problem}", retry=False)


def _is_score(score: Any) -> bool:
    number = isinstance(score, int | float) and not isinstance(score, bool)
    return score is None or (number and abs(score) < 3e38)  # NaN is refused too
