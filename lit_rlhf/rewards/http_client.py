"""Requests to a server that computes rewards or samples completions."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.errors import InputError, MissingPackageError

T = TypeVar("T")

MAX_ANSWER_BYTES = 2**24
MAX_WAIT = 60.0
"""Longest pause before a retry, in seconds."""
QUIET_RETRIES = 3
"""Retries before a warning says that a service is still being tried."""


class ServiceError(RuntimeError):
    """A service failed. The message is one sentence that names the service.

    Attributes:
        retry: Whether another attempt may succeed.
        wait: Seconds that the service asked to wait.
    """

    def __init__(self, message: str, retry: bool = True, wait: float = 0.0) -> None:
        super().__init__(message)
        self.retry, self.wait = retry, wait


def check_client(user: str) -> None:
    """Check that the HTTP client is installed.

    Raises:
        ImportError: If it is not.
    """
    try:
        import httpx2  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(f"{user} needs the package httpx2: pip install 'lit_rlhf[http]'") from error


def check_url(url: str, example: str) -> str:
    """Return an address for messages, without what may be secret.

    Raises:
        ValueError: If it is not the address of a server, or holds a password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{url!r} is not the address of a server: give a url such as {example}")
    if parts.password:
        raise InputError(f"the url of {parts.hostname} holds a password: give it in an environment variable")
    return f"{parts.scheme}://{parts.netloc}{parts.path}"  # a query may hold a secret


def read_key(variable: str | None, user: str) -> str:
    """Return the API key in an environment variable, empty without one.

    Raises:
        ValueError: If the variable is not set.
    """
    if variable is None:
        return ""
    if not (key := os.environ.get(variable, "").strip()):
        raise InputError(f"the environment variable {variable} of {user}'s api_key_env is not set")
    return key


def send(method: str, url: str, content: bytes | None, timeout: float, shown: str, key: str = "") -> tuple[int, str]:
    """Send one request, and return status and text of the answer.

    Args:
        method: `GET` or `POST`.
        url: The address.
        content: The body, in JSON.
        timeout: Seconds that the whole request may take.
        shown: The address in messages.
        key: A key that is sent as `Authorization: Bearer ...`, and shown in no message.

    Raises:
        RuntimeError: If there is no answer, or one of a failing or busy server.
    """
    import httpx2

    end = time.monotonic() + timeout
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    answer = bytearray()
    try:
        with (
            httpx2.Client(timeout=timeout) as client,
            client.stream(method, url, content=content, headers=headers) as response,
        ):
            for chunk in response.iter_bytes():
                answer += chunk
                if time.monotonic() > end:  # the client's own time-out starts again with each chunk
                    raise httpx2.ReadTimeout("")
                if len(answer) > MAX_ANSWER_BYTES:
                    raise ServiceError(f"{shown} sent more than {MAX_ANSWER_BYTES} bytes", retry=False)
    except httpx2.TimeoutException as error:
        raise ServiceError(f"{shown} did not answer within {timeout:g} s") from error
    except httpx2.RequestError as error:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ServiceError(f"{shown} can't be reached or broke off ({reason})") from error
    text = answer.decode("utf-8", errors="replace")
    text = text.replace(key, "***") if key else text
    if response.status_code == 429 or response.status_code >= 500:
        wait = response.headers.get("Retry-After", "")
        raise ServiceError(
            f"{shown} answered with status {response.status_code}: {short(text)}",
            wait=float(wait) if wait.isdecimal() else 0.0,
        )
    return response.status_code, text


def attempt(
    call: Callable[[], T],
    retries: int,
    backoff: float,
    may_retry: Callable[[Exception], bool],
    stop: threading.Event,
) -> T:
    """Call a service, again after failures, with pauses that double up to 60 seconds, and return its answer.

    A warning says that it is still being tried, before the fourth retry.

    Args:
        call: Calls it.
        retries: Further attempts after one that failed.
        backoff: Seconds before the first of them; what the service asks for has precedence.
        may_retry: Whether another attempt may succeed after an error.
        stop: Ends the pauses when it is set.

    Raises:
        Exception: That of the last attempt.
        TimeoutError: If it was stopped.
    """
    for i in range(retries + 1):
        try:
            return call()
        except Exception as error:
            if i == retries or not may_retry(error):
                raise
            if i == QUIET_RETRIES:
                rank_zero_warn(f"{error}: tried {i + 1} times, and up to {retries - i} times more")
            wait = max(backoff * 2**i, getattr(error, "wait", 0.0))
        if stop.wait(min(wait, MAX_WAIT)):
            break
    raise TimeoutError("the call was given up")


def short(text: str) -> str:
    """Return a text on one line, shortened to 120 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:120]}..."
