"""A small server that answers as vLLM does, from a copy of the weights, with failures on demand."""

import json
import os
import sys
import threading
import uuid
from itertools import pairwise
from pathlib import Path

import torch

from lit_rlhf import Policy, Prompts, Sampling
from local_server import serve

SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


class FakeVLLM:
    """Serves `folder`. `failures` are statuses to answer with first; `ignores_renewals` keeps the weights of the start.

    Attributes:
        requests: Bodies of all requests for completions.
        renewals: Number of renewals.
        naps: How often it fell asleep.
        before_completion: Called with the number of each request for completions, before it is answered.
    """

    def __init__(self, folder, ignores_renewals=False, failures=(), extension=True, port=0):
        self.source, self.ignores_renewals, self.failures = Path(folder), ignores_renewals, list(failures)
        self.extension, self.requests, self.renewals, self.asleep, self.naps = extension, [], 0, False, 0
        self.before_completion = lambda number: None
        self.lock = threading.RLock()
        self.restart()
        self.http, self.url = serve(self.answer, port)

    def answer(self, handler, body):
        if body is None:  # also for /health
            status, answer = 200, {"data": [{"id": "policy"}]}
        else:
            with self.lock:
                status, answer = self.post(handler.path.partition("?")[0], body)
        content = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def restart(self):
        self.instance, self.version = uuid.uuid4().hex, ""
        self.policy = Policy.from_pretrained(str(self.source))

    def post(self, path, body):
        if self.failures:
            return self.failures.pop(0), {"error": "planted"}
        if path in ("/pause", "/resume"):
            return 200, {}
        if path in ("/sleep", "/wake_up"):
            self.asleep = path == "/sleep"
            self.naps += self.asleep
            return 200, {}
        assert not self.asleep, f"{path} while it sleeps"
        if path == "/collective_rpc":
            return self.call(body["method"], **body["kwargs"]) if self.extension else (404, {})
        self.requests.append(body)
        if body["temperature"] == 0 and body["n"] > 1:
            return 400, {"error": "n must be 1 when using greedy sampling"}
        self.before_completion(len(self.requests))
        return 200, {"choices": self.complete(body)}

    def call(self, method, folder=None, version=None):
        if method == "lit_rlhf_renew":
            self.renewals += 1
            if not self.ignores_renewals:
                from transformers import AutoModelForCausalLM

                weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
                self.policy.causal_lm.load_state_dict(weights)
            self.version = version
        config = self.policy.causal_lm.config
        model = {name: getattr(config, name) for name in SHAPE}
        return 200, {
            "results": [{"instance": self.instance, "version": self.version, "dtype": "float32", "model": model}]
        }

    def complete(self, body):
        sampling = Sampling(
            max_new_tokens=body["max_tokens"],
            min_new_tokens=body["min_tokens"],
            temperature=body["temperature"] or 1.0,
            greedy=body["temperature"] == 0,
            top_p=body["top_p"],
            top_k=body["top_k"],
        )
        tokens = torch.tensor([body["prompt"]])
        prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([0]), [""])
        self.policy.eos_ids = body["stop_token_ids"]
        out = self.policy.sample(prompts, body["n"], sampling, body["seed"])
        mass = torch.zeros_like(out.logprobs) if out.sampled_mass is None else out.sampled_mass.log()
        return [
            {
                "index": i,
                "token_ids": ids,
                "logprobs": {"token_logprobs": (out.logprobs - mass)[0, i, : len(ids)].tolist()},
                "finish_reason": "stop" if out.finished[0, i] else "length",
            }
            for i, ids in enumerate(out.ids())
        ]


def main():
    """Serve as the command `vllm` does, and write down what it was given."""
    _, folder, *options = sys.argv[1:]
    given = dict(pairwise(options))
    record = {"arguments": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()}
    Path(os.environ["FAKE_VLLM_RECORD"]).write_text(json.dumps(record))
    if "--fail" in options:
        sys.exit("no memory for the cache")
    FakeVLLM(folder, port=int(given["--port"]))
    threading.Event().wait()


if __name__ == "__main__":
    main()
