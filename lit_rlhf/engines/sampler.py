"""Sampling by a server: completions with their log-probabilities, from weights that are the policy's."""

from __future__ import annotations

import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_rlhf.engines.launch import StartedServer
from lit_rlhf.engines.options import Engine
from lit_rlhf.engines.server import START, Answer, VLLMServer
from lit_rlhf.errors import InputError
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling, join_completions
from lit_rlhf.models.stop_strings import StopStrings
from lit_rlhf.rewards.calls import interruptible
from lit_rlhf.types import Completions, Prompts

SHARED_MEMORY = Path("/dev/shm")
PROBE_PROMPTS, PROBE_TOKENS = 2, 8
"""How many tokens are sampled to compare the server's log-probabilities with the policy's."""
MAX_RENEWALS = 3
"""How often one batch is sampled again because the server lost the weights meanwhile."""


class ServerSampler:
    """Samples from a policy by a vLLM server.

    Several ranks may use one server: one of them calls `renew`, then all of them `sample`. A server that has restarted
    gets the weights again by the rank that notices.

    Args:
        policy: The policy.
        options: The server.
        started: The server, if this process has started it.
    """

    def __init__(self, policy: Policy, options: Engine, started: StartedServer | None = None) -> None:
        self.policy, self.options, self.server = policy, options, VLLMServer(options, started)
        self.folder, self.version = "", ""
        self.close: Callable[[], Any] = lambda: None  # removes the weights, at the end of the process at the latest

    def renew(self, save: Callable[[Path], None]) -> None:
        """Give the server the policy's weights.

        Args:
            save: Writes the model into a folder.
        """
        with interruptible(f"the vLLM server {self.server.shown}"):
            workers = self.server.describe()
        self._check_model(workers)
        self.close()
        self.folder, self.version = str(make_folder(self.options)), uuid.uuid4().hex
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        save(Path(self.folder))
        with interruptible(f"the vLLM server {self.server.shown}"):
            self.server.renew(self.folder, self.version)

    def use(self, folder: str, version: str) -> None:
        """Expect weights that another rank has given to the server."""
        self.folder, self.version = folder, version

    @torch.no_grad()
    def sample(
        self,
        prompts: Prompts,
        num_samples: int,
        sampling: Sampling,
        seed: int = 0,
        epoch: int = 0,
        with_greedy: bool = False,
    ) -> Completions:
        """Sample as `Policy.sample` does, with the server's own noise. Where sharded, call it on all ranks.

        Raises:
            ValueError: If the server fails, or samples from another policy.
        """
        probed = prompts.rows(slice(PROBE_PROMPTS)).trim()
        plain = Sampling(max_new_tokens=PROBE_TOKENS, temperature=sampling.temperature)
        requests = self._requests(prompts, num_samples, sampling, seed, epoch)
        if with_greedy:
            requests += self._requests(prompts, 1, replace(sampling, greedy=True), seed, epoch)
        with interruptible(f"the vLLM server {self.server.shown}"):
            answers = self._complete(requests + self._requests(probed, 1, plain, seed, epoch))
        rows, probes = answers[: len(requests)], answers[len(requests) :]
        self._check_logprobs(probed, self._assemble(probed, probes, plain), plain.temperature)
        completions = self._completions(prompts, rows[: len(prompts)], num_samples, sampling)
        if with_greedy:
            greedy = self._completions(prompts, rows[len(prompts) :], 1, replace(sampling, greedy=True))
            if completions.sampled_mass is not None:
                greedy = greedy.replace(sampled_mass=greedy.mask.to(greedy.logprobs))
            completions = join_completions([completions, greedy], axis=1)
        return completions

    def _completions(
        self, prompts: Prompts, rows: list[list[Answer]], num_samples: int, sampling: Sampling
    ) -> Completions:
        """Return answers as completions, with the log-probabilities of the policy's whole distribution."""
        completions = self._assemble(prompts, [row * num_samples if sampling.greedy else row for row in rows], sampling)
        if not (sampling.truncates or (sampling.greedy and (sampling.temperature != 1 or sampling.min_new_tokens))):
            return completions
        # the server's are relative to the tokens that it may sample
        own = self._logprobs(prompts, completions, sampling.temperature)
        mass = (own - completions.logprobs).exp().clamp(max=1.0).masked_fill(~completions.mask, 0.0)
        return completions.replace(logprobs=own, sampled_mass=mass if sampling.truncates else None)

    def _complete(self, requests: list[dict[str, Any]]) -> list[list[Answer]]:
        """Return completions that were sampled from this version's weights from the first token to the last."""
        for _ in range(MAX_RENEWALS):
            before = self.server.describe()
            if any(worker["version"] != self.version for worker in before):
                self.server.renew(self.folder, self.version)
                before = self.server.describe()
            answers = self.server.complete(requests)
            if self.server.describe() == before:
                return answers
        raise InputError(
            f"engine.url: {self.server.shown} lost the policy's weights {MAX_RENEWALS} times while it sampled: it "
            "restarts, or another run renews them; give each run its own server"
        )

    def _requests(
        self, prompts: Prompts, num_samples: int, sampling: Sampling, seed: int, epoch: int
    ) -> list[dict[str, Any]]:
        """Return one request per prompt. All options are given, as the server has its own defaults for each model."""
        options = {
            "n": 1 if sampling.greedy else num_samples,  # vLLM refuses to repeat a greedy completion
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens,
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "top_p": 1.0 if sampling.greedy else sampling.top_p,
            "top_k": 0 if sampling.greedy else sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "stop_token_ids": list(self.policy.eos_ids),
            "ignore_eos": True,  # those of the policy count
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
        tokens, mask = prompts.tokens.cpu(), prompts.mask.cpu()
        return [
            {**options, "prompt": tokens[i][mask[i]].tolist(), "seed": request_seed(seed, epoch, row)}
            for i, row in enumerate(prompts.index.tolist())
        ]

    def _assemble(self, prompts: Prompts, answers: list[list[Answer]], sampling: Sampling) -> Completions:
        """Return the answers as a record, each cut at its first EOS token or stop string."""
        eos = set(self.policy.eos_ids)
        stops = StopStrings(self.policy.tokenizer, sampling.stop) if sampling.stop else None
        cut = [[_cut(answer, eos, stops) for answer in row] for row in answers]
        length = max(len(answer.tokens) for row in cut for answer in row)
        shape, device = (len(cut), len(cut[0]), length), prompts.tokens.device
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        logprobs = torch.zeros(shape)
        for i, row in enumerate(cut):
            for j, answer in enumerate(row):
                count = len(answer.tokens)
                tokens[i, j, :count], mask[i, j, :count] = torch.tensor(answer.tokens), True
                logprobs[i, j, :count] = torch.tensor(answer.logprobs)
        finished = torch.tensor([[answer.finished for answer in row] for row in cut])
        return Completions(tokens, mask, logprobs, finished).to(device)

    def _logprobs(self, prompts: Prompts, completions: Completions, temperature: float) -> Tensor:
        with self.policy.model_forward.without_gradient():
            return self.policy.logprobs(prompts.trim(), completions, temperature)

    def _check_logprobs(self, prompts: Prompts, completions: Completions, temperature: float) -> None:
        """Check that the server samples from the policy.

        Raises:
            ValueError: If its log-probabilities are others.
        """
        own = self._logprobs(prompts, completions, temperature)
        difference = float((own - completions.logprobs).abs()[completions.mask].mean())
        tolerance = self.options.tolerance or (0.1 if self._computes_in_16_bits() else 1e-3)
        if not difference <= tolerance:
            raise InputError(
                f"engine.url: {self.server.shown} samples from another policy: its log-probabilities differ from this "
                f"run's by {difference:.2g} nats per token (engine.tolerance {tolerance:g}); start it with the "
                "policy's folder, --logprobs-mode processed_logprobs and the dtype of this run"
            )

    def _computes_in_16_bits(self) -> bool:
        own = next(self.policy.parameters())
        theirs = self.server.describe()[0]["dtype"]
        return theirs != "float32" or own.element_size() < 4 or torch.is_autocast_enabled(own.device.type)

    def _check_model(self, workers: list[dict[str, Any]]) -> None:
        config = self.policy.causal_lm.config.get_text_config()
        for name, theirs in workers[0]["model"].items():
            own = getattr(config, name, None)
            if theirs != own:
                raise InputError(
                    f"engine.url: {self.server.shown} serves another model ({name} {theirs}, and the policy's is "
                    f"{own}): {START}, and with the policy's folder"
                )


def make_folder(options: Engine) -> Path:
    """Make a folder in which weights are handed over to a server."""
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    parent = options.folder or (SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
    folder = Path(tempfile.mkdtemp(prefix="lit_rlhf_", dir=parent))
    folder.chmod(0o755)  # the server may be another user's
    return folder


def request_seed(seed: int, epoch: int, row: int) -> int:
    """Return the seed of a prompt's request, of 62 bits: vLLM adds the number of the sample."""
    return int(np.random.SeedSequence([seed, epoch, row]).generate_state(1, np.uint64)[0] >> np.uint64(2))


def _cut(answer: Answer, eos: set[int], stops: StopStrings | None) -> Answer:
    for t, token in enumerate(answer.tokens):
        if token in eos or (stops is not None and bool(stops(torch.tensor([answer.tokens[: t + 1]]))[0])):
            return Answer(answer.tokens[: t + 1], answer.logprobs[: t + 1], True)
    return answer
