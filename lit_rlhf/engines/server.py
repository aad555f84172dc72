"""The requests that a vLLM server answers: which weights it has, new weights, and completions."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

from lit_rlhf.engines.launch import StartedServer
from lit_rlhf.engines.options import Engine
from lit_rlhf.errors import InputError
from lit_rlhf.rewards.http_client import ServiceError, attempt, check_url, send, short
from lit_rlhf.rewards.threads import map_in_threads

START = (
    "start it with VLLM_SERVER_DEV_MODE=1, the folder lit_rlhf/engines/worker in PYTHONPATH, and "
    "--worker-extension-cls lit_rlhf_worker.WeightRenewal"
)


@dataclass(frozen=True)
class Answer:
    """One completion.

    Attributes:
        tokens: Token ids, the EOS token included.
        logprobs: Log-probability of each.
        finished: Whether it ended by itself.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool


class VLLMServer:
    """A vLLM server with this package's worker extension.

    Args:
        options: Its address, and how long to wait for it.
        started: The server, if the run has started it.
    """

    def __init__(self, options: Engine, started: StartedServer | None = None) -> None:
        assert options.url is not None
        self.options, self.url, self.started = options, options.url.rstrip("/"), started
        self.shown = check_url(self.url, "http://127.0.0.1:8000")
        self._model = ""

    def describe(self) -> list[dict[str, Any]]:
        """Return instance, version, dtype and model of each of its workers.

        Raises:
            ValueError: If it can't.
        """
        return self._call_workers("lit_rlhf_describe")

    def renew(self, folder: str, version: str) -> None:
        """Load weights. What the server is sampling is dropped, and so are its cached prompts.

        Args:
            folder: A model's folder.
            version: Name of these weights.

        Raises:
            ValueError: If it can't load them.
        """
        self._try(lambda: self._json("POST", "/pause?mode=abort"))
        try:
            answers = self._call_workers("lit_rlhf_renew", folder=folder, version=version)
        finally:
            self._try(lambda: self._json("POST", "/resume"))
        if errors := [answer["error"] for answer in answers if "error" in answer]:
            raise InputError(
                f"{self.shown} can't load the policy's weights ({short(errors[0])}): start the server with the "
                "policy's folder, and give engine.folder if it can't read this machine's /dev/shm"
            )

    def sleep(self) -> None:
        """Free the memory of the device; the weights wait in main memory.

        Raises:
            ValueError: If it can't.
        """
        self._try(lambda: self._json("POST", "/sleep?level=1"))

    def wake(self) -> None:
        """Be ready again.

        Raises:
            ValueError: If it can't.
        """
        self._try(lambda: self._json("POST", "/wake_up"))

    def complete(self, requests: list[dict[str, Any]]) -> list[list[Answer]]:
        """Return the completions of each request, in order of their number.

        Args:
            requests: Bodies of `/v1/completions`, without the model.

        Raises:
            ValueError: If the server does not complete one of them.
        """
        stop = threading.Event()
        self._model = self._model or self._try(self._served)

        def complete(request: dict[str, Any]) -> list[Answer]:
            answers: list[Answer] = self._try(lambda: self._completions(request), stop)
            return answers

        return map_in_threads(complete, requests, self.options.concurrency, stop)

    def _served(self) -> str:
        models = [model["id"] for model in self._json("GET", "/v1/models")["data"]]
        return str(models[0])

    def _completions(self, request: dict[str, Any]) -> list[Answer]:
        choices = self._json("POST", "/v1/completions", {"model": self._model, **request})["choices"]
        if any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
            raise ServiceError(f"{self.shown} dropped a request")
        return [
            Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"] == "stop")
            for choice in sorted(choices, key=lambda choice: choice["index"])
        ]

    def _call_workers(self, method: str, **kwargs: str) -> list[dict[str, Any]]:
        body = {"method": method, "kwargs": kwargs}
        results: list[dict[str, Any]] = self._try(lambda: self._json("POST", "/collective_rpc", body)["results"])
        return results

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        try:
            status, text, _ = send(method, self.url + path, content, self.options.timeout, f"{self.shown}{path}")
        except ServiceError as error:
            if path == "/collective_rpc" and "status 500" in str(error):
                raise ServiceError(f"{error}: {START}") from error
            raise
        if status == 404 and path != "/v1/completions":
            raise ServiceError(f"{self.shown} has no {path}: {START}", retry=False)
        if status == 404:
            self._model = ""
        if status == 200 and not text:  # vLLM 0.31 and older, to /sleep and /wake_up
            return None
        if status != 200:
            raise ServiceError(f"{self.shown}{path} answered with status {status}: {short(text)}", retry=False)
        try:
            return json.loads(text)
        except ValueError as error:
            raise ServiceError(f"{self.shown}{path} answered {short(text)!r}, which is not JSON") from error

    def _may_answer(self) -> bool:
        return self.started is None or self.started.is_running

    def _try(self, call: Any, stop: threading.Event | None = None) -> Any:
        """Call with retries; the last failure becomes the run's error."""
        options = self.options
        try:
            return attempt(
                call,
                options.retries,
                options.backoff,
                lambda error: isinstance(error, ServiceError) and error.retry and self._may_answer(),
                stop or threading.Event(),
            )
        except ServiceError as error:
            if self.started is not None:
                raise InputError(f"engine.start: {error}; {self.started.state}") from error
            resume = "; once the server runs, resume from the last checkpoint" if error.retry else ""
            raise InputError(f"engine.url: {error}{resume}") from error
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(f"engine.url: {self.shown} does not answer as a vLLM server does ({error!r})") from error
