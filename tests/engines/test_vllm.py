"""RLOO through a real vLLM server; `tests/vllm.sh` makes its environment and runs this."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lit_rlhf import Engine, Policy, Prompts, Sampling
from lit_rlhf.engines import ServerSampler
from lit_rlhf.errors import InputError
from runs import make_data, make_module, make_trainer
from tiny import make_llama, make_tokenizer

ENVIRONMENT = os.environ.get("VLLM_ENVIRONMENT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not ENVIRONMENT, reason="run tests/vllm.sh"),
]
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
ON_A_CPU = "--dtype float32 --max-model-len 256 --max-num-seqs 32 --enforce-eager".split()
WORKER = Path(__file__).parents[2] / "lit_rlhf" / "engines" / "worker"


class Server:
    """`vllm serve` in a process group, which can be killed and started again."""

    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log, self.url = folder, log, f"http://127.0.0.1:{self.port}"
        self.start()
        self.wait()

    def start(self):
        own = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(WORKER)}
        options = "--logprobs-mode processed_logprobs --worker-extension-cls lit_rlhf_worker.WeightRenewal"
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        command = [f"{ENVIRONMENT}/bin/vllm", "serve", str(self.folder), *address, *options.split(), *ON_A_CPU]
        environment = {**os.environ, **VARIABLES, **own}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self):
        for _ in range(180):
            try:
                return urllib.request.urlopen(f"{self.url}/health").status
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = make_tokenizer(chat=False)
    path = tmp_path_factory.mktemp("model")
    make_llama(len(tokenizer), hidden=128, tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = Server(folder, tmp_path_factory.mktemp("log") / "vllm.log")
    yield server
    server.kill()


@pytest.fixture
def policy(folder):
    return Policy.from_pretrained(str(folder))


def make_prompts(rows=6):
    tokens = torch.randint(40, 120, (rows, 7), generator=torch.Generator().manual_seed(1))
    tokens[::2, :3] = 0
    return Prompts(tokens, tokens != 0, torch.arange(rows), [""] * rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"greedy": True},
        {"greedy": True, "temperature": 0.5},
        {"top_p": 0.8},
        {"top_k": 5},
        {"min_new_tokens": 4},
        {"stop": ["e", "a"]},
    ],
    ids=str,
)
def test_completions_are_the_policys(options, policy, server):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    policy.eos_ids = [2, *range(100, 120)]
    sampler = ServerSampler(policy, Engine(url=server.url))
    sampler.renew(policy.save_whole)
    prompts, sampling = make_prompts(), Sampling(max_new_tokens=16, **options)
    out = sampler.sample(prompts, 3, sampling, seed=1)
    own = policy.logprobs(prompts, out, sampling.temperature).detach()
    difference = float((own - out.logprobs).abs().max())
    print(f"\n{options}: largest difference {difference:.1e}, {int(out.mask.sum())} tokens")
    assert difference < 1e-4
    assert sampler.sample(prompts, 3, sampling, seed=1).ids() == out.ids()
    if sampling.greedy:
        assert out.ids() == policy.sample(prompts, 3, sampling).ids()
    assert int(out.lengths.min()) >= sampling.min_new_tokens
    if sampling.truncates and sampling.top_p < 1:
        assert float(out.sampled_mass[out.mask].min()) > 0.8 - 1e-4
    for ids, finished in zip(out.ids(), out.finished.flatten().tolist(), strict=True):
        assert not set(ids[:-1]) & set(policy.eos_ids)
        stopped = any(stop in policy.tokenizer.decode(ids) for stop in sampling.stop)
        assert finished == (ids[-1] in policy.eos_ids or stopped)


def test_rows_of_one_batch_are_independent(policy, server):
    sampler = ServerSampler(policy, Engine(url=server.url))
    sampler.renew(policy.save_whole)
    prompts = make_prompts()
    same = prompts.replace(tokens=prompts.tokens[1:2].expand(6, -1), mask=prompts.mask[1:2].expand(6, -1))
    ids = [tuple(row) for row in sampler.sample(same, 4, Sampling(max_new_tokens=8)).ids()]
    assert len(set(ids)) == 24


def train(folder, root, server, callbacks=(), ckpt_path=None, **options):
    rows = []

    class Metrics(Callback):
        def on_train_batch_end(self, trainer, *args):
            rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    module = make_module("RLOO", folder, engine=Engine(url=server.url), max_new_tokens=12, **options)
    trainer = make_trainer(root, max_steps=6, callbacks=[*callbacks, Metrics()], num_sanity_val_steps=0)
    trainer.fit(module, make_data("RLOO", val=None), ckpt_path=ckpt_path)
    return module, rows


def test_training_survives_a_restart_of_the_server(folder, server, tmp_path):
    class Restart(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                server.kill()
                server.start()  # the next rollout waits for it

    started = time.monotonic()
    _, rows = train(folder, tmp_path, server, [Restart()])
    mismatches = [row["train/logprob_mismatch"] for row in rows]
    print(f"\n6 updates and a restart in {time.monotonic() - started:.0f} s, mismatch at most {max(mismatches):.1e}")
    assert len(rows) == 6 and max(mismatches) < 1e-4
    assert not list(Path("/dev/shm").glob("lit_rlhf_*"))


def test_an_adapter_is_served(folder, server, tmp_path):
    _, rows = train(folder, tmp_path, server, lora={"r": 4, "target_modules": "all-linear"})
    assert max(row["train/logprob_mismatch"] for row in rows) < 1e-4


def test_a_run_starts_its_server(folder, tmp_path):
    engine = Engine(start=f"{ENVIRONMENT}/bin/vllm", arguments=ON_A_CPU, environment=VARIABLES)
    module = make_module("RLOO", folder, engine=engine, max_new_tokens=12)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, make_data("RLOO"))
    assert trainer.callback_metrics["train/logprob_mismatch"] < 1e-4
    assert "Application startup complete" in (tmp_path / "vllm.log").read_text()


def test_another_model_is_refused(server, tmp_path):
    tokenizer = make_tokenizer(chat=False)
    make_llama(len(tokenizer), hidden=64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    other = Policy.from_pretrained(str(tmp_path))
    with pytest.raises(InputError, match=r"serves another model .hidden_size 128, and the policy's is 64"):
        ServerSampler(other, Engine(url=server.url)).renew(other.save_whole)


def test_an_exported_policy_is_served_with_the_same_greedy_completions(folder, server, tmp_path):
    module, _ = train(folder, tmp_path / "run", server)
    module.export(tmp_path / "exported")
    exported = Policy.from_pretrained(str(tmp_path / "exported"))
    other = Server(tmp_path / "exported", tmp_path / "vllm.log")
    try:
        sampler, sampling = ServerSampler(exported, Engine(url=other.url)), Sampling(max_new_tokens=16, greedy=True)
        served = sampler._assemble(make_prompts(), sampler.server.complete(
            sampler._requests(make_prompts(), 1, sampling, 0, 0)
        ), sampling)  # fmt: skip
    finally:
        other.kill()
    assert served.ids() == module.policy.sample(make_prompts(), 1, sampling).ids()
