"""Requests to a server that computes rewards or samples completions."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.errors import InputError, MissingPackageError
from lit_rlhf.rewards.threads import call_within

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
        hopeless: Whether every other request would fail in the same way, as with a wrong key.
    """

    def __init__(self, message: str, retry: bool = True, wait: float = 0.0, hopeless: bool = False) -> None:
        super().__init__(message)
        self.retry, self.wait, self.hopeless = retry, wait, hopeless


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
        ValueError: If it is not the address of a server, or holds a user or a password.
    """
    try:
        parts = urlsplit(url)
        is_server = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unclosed bracket
        is_server = False
    if not is_server:
        harmless = url.partition("?")[0].rpartition("@")[2]
        raise InputError(f"{harmless!r} is not the address of a server: give a url such as {example}")
    if parts.username is not None:
        raise InputError(
            f"the url of {parts.hostname} holds a user or a password: give a key in an environment variable"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path}"  # a query may hold a secret


def at_path(url: str, path: str) -> str:
    """Return an address with a path added to its own, before a query."""
    parts = urlsplit(url)
    return parts._replace(path=parts.path.rstrip("/") + path).geturl()


def read_key(variable: str | None, user: str) -> str:
    """Return the API key in an environment variable, empty without one.

    Raises:
        ValueError: If the variable is not set, or holds what no header can.
    """
    if variable is None:
        return ""
    if not (key := os.environ.get(variable, "").strip()):
        raise InputError(f"the environment variable {variable} of {user}'s api_key_env is not set")
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"the environment variable {variable} of {user}'s api_key_env is no key: it has other characters"
        )
    return key


class Answer(NamedTuple):
    """What a server answered.

    Attributes:
        status: The HTTP status.
        text: The body.
        excerpt: Its beginning on one line for messages, without the key.
    """

    status: int
    text: str
    excerpt: str

    def check_status(self, shown: str) -> None:
        """Check that the status is 200.

        Args:
            shown: The address in messages.

        Raises:
            RuntimeError: If it is not.
        """
        if self.status != 200:
            message = f"{shown} answered with status {self.status}: {self.excerpt}"
            raise ServiceError(message, retry=False, hopeless=self.status in (401, 404))


def send(method: str, url: str, content: bytes | None, timeout: float, shown: str, key: str = "") -> Answer:
    """Send one request, and return the answer.

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

    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    received, end = bytearray(), time.monotonic() + timeout

    def exchange() -> httpx2.Response:
        with (
            httpx2.Client(timeout=timeout) as client,
            client.stream(method, url, content=content, headers=headers) as response,
        ):
            for chunk in response.iter_bytes():
                received.extend(chunk)
                if time.monotonic() > end:  # nobody waits any more
                    raise httpx2.ReadTimeout("")
                if len(received) > MAX_ANSWER_BYTES:
                    raise ServiceError(f"{shown} sent more than {MAX_ANSWER_BYTES} bytes", retry=False)
        return response

    try:
        response = call_within(timeout, exchange)  # the client's own time-out starts again with each byte
    except (httpx2.TimeoutException, TimeoutError) as error:
        raise ServiceError(f"{shown} did not answer within {timeout:g} s") from error
    except httpx2.RequestError as error:
        reason = without(f"{type(error).__name__}: {error}".rstrip(": "), key)  # a malformed answer may repeat it
        raise ServiceError(f"{shown} can't be reached or broke off ({reason})") from error
    text = received.decode("utf-8", errors="replace")
    answer = Answer(response.status_code, text, short(without(text, key)))
    if answer.status == 429 or answer.status >= 500:
        wait = response.headers.get("Retry-After", "")
        raise ServiceError(
            f"{shown} answered with status {answer.status}: {answer.excerpt}",
            wait=float(wait) if wait.isdecimal() else 0.0,
        )
    return answer


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


def without(text: str, key: str) -> str:
    """Return a text for a message, without a key that a server has repeated, plainly or escaped as in JSON."""
    escaped = json.dumps(key)[1:-1]
    for form in (key, escaped, escaped.replace("/", "\\/")) if key else ():
        text = text.replace(form, "***")
    return text


def short(text: str) -> str:
    """Return a text on one line, shortened to 120 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:120]}..."
