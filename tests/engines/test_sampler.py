"""Completions from a server: the same records as the policy's own sampler makes, from its weights alone."""

import copy

import pytest
import torch

from fake_vllm import FakeVLLM
from lit_rlhf import Engine, Policy, Prompts, Sampling
from lit_rlhf.engines import ServerSampler
from lit_rlhf.errors import InputError
from tiny import make_llama, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = make_tokenizer(chat=False)
    path = tmp_path_factory.mktemp("model")
    make_llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def policy(folder):
    policy = Policy.from_pretrained(str(folder))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    return policy


@pytest.fixture(scope="module")
def prompts():
    tokens = torch.tensor([[0, 40, 41, 42], [50, 51, 52, 53], [0, 0, 60, 61]])
    return Prompts(tokens, tokens != 0, torch.tensor([3, 7, 9]), ["", "", ""])


def renewed(policy, server, **options):
    sampler = ServerSampler(policy, Engine(url=server.url, **{"retries": 2, "backoff": 0.01, **options}))
    sampler.renew(policy.save_whole)
    return sampler


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"greedy": True},
        {"greedy": True, "temperature": 0.5},
        {"top_p": 0.8},
        {"top_k": 5, "temperature": 1.3},
        {"min_new_tokens": 4},
        {"stop": ["e", "th"]},
    ],
    ids=str,
)
def test_logprobs_and_mass_are_the_policys(folder, policy, prompts, options):
    sampling = Sampling(max_new_tokens=8, **options)
    policy.eos_ids = [2, *range(100, 130)]  # several, so that some completions end
    sampler = renewed(policy, FakeVLLM(folder))
    out = sampler.sample(prompts, 4, sampling, seed=5, epoch=1)
    own = policy.logprobs(prompts, out, sampling.temperature)
    assert torch.allclose(out.logprobs, own.detach(), atol=1e-5)
    if sampling.greedy:
        assert out.ids() == policy.sample(prompts, 4, sampling).ids()
    assert (out.sampled_mass is not None) == sampling.truncates
    if sampling.top_p < 1:
        assert float(out.sampled_mass[out.mask].min()) > 0.8 - 1e-5
    if sampling.min_new_tokens:
        assert int(out.lengths.min()) >= 4
    for ids, finished in zip(out.ids(), out.finished.flatten().tolist(), strict=True):
        text = policy.tokenizer.decode(ids)
        stopped = any(s in text for s in sampling.stop)
        assert finished == (ids[-1] in policy.eos_ids or stopped)
        assert not any(s in policy.tokenizer.decode(ids[:-1]) for s in sampling.stop)
        assert not set(ids[:-1]) & set(policy.eos_ids)


def test_requests_are_addressed_by_seed_epoch_and_row(folder, policy, prompts):
    server = FakeVLLM(folder)
    sampler, sampling = renewed(policy, server), Sampling(max_new_tokens=5)
    whole = sampler.sample(prompts, 2, sampling, seed=1, epoch=2)
    alone = sampler.sample(prompts.rows(slice(1, 2)), 2, sampling, seed=1, epoch=2)
    assert alone.ids() == whole.ids()[2:4]
    assert sampler.sample(prompts, 2, sampling, seed=1, epoch=3).ids() != whole.ids()
    seeds = {request["seed"] for request in server.requests}
    assert len(seeds) == 6 and max(seeds) < 2**62


def test_a_server_that_restarts_while_it_samples_gets_the_weights_again(folder, policy, prompts):
    server = FakeVLLM(folder)
    sampler = renewed(policy, server, concurrency=1)
    expected = sampler.sample(prompts, 2, Sampling(max_new_tokens=5))
    start = len(server.requests)
    server.before_completion = lambda number: server.restart() if number == start + 2 else None
    again = sampler.sample(prompts, 2, Sampling(max_new_tokens=5))
    assert again.ids() == expected.ids() and torch.equal(again.logprobs, expected.logprobs)
    assert server.renewals == 2


def test_a_server_that_always_restarts_is_given_up(folder, policy, prompts):
    server = FakeVLLM(folder)
    sampler = renewed(policy, server)
    server.before_completion = lambda number: server.restart()
    with pytest.raises(InputError, match="lost the policy's weights 3 times while it sampled"):
        sampler.sample(prompts, 1, Sampling(max_new_tokens=2))


def test_failures_are_retried_within_a_bound(folder, policy, prompts):
    server = FakeVLLM(folder)
    sampler = renewed(policy, server)
    server.failures = [503, 500]
    assert len(sampler.sample(prompts, 1, Sampling(max_new_tokens=2)).ids()) == 3
    server.failures = [503] * 3
    with pytest.raises(InputError, match=r"engine.url: http.*status 503.*resume from the last checkpoint"):
        sampler.sample(prompts, 1, Sampling(max_new_tokens=2))
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(InputError, match="can't be reached"):
        sampler.sample(prompts, 1, Sampling(max_new_tokens=2))


def test_a_wrong_policy_is_refused(folder, policy, prompts, tmp_path):
    stale = renewed(policy, FakeVLLM(folder, ignores_renewals=True))
    with pytest.raises(
        InputError, match=r"samples from another policy: its log-probabilities differ .* by 0\.\d+ nats"
    ):
        stale.sample(prompts, 1, Sampling(max_new_tokens=2))
    with pytest.raises(InputError, match="has no /collective_rpc: start it with VLLM_SERVER_DEV_MODE=1"):
        renewed(policy, FakeVLLM(folder, extension=False))
    make_llama(len(policy.tokenizer), hidden=64).save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"serves another model .hidden_size 64, and the policy's is 32"):
        renewed(policy, FakeVLLM(tmp_path))


def test_an_adapter_is_merged(folder, prompts):
    policy = Policy.from_pretrained(str(folder), lora={"r": 4})
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = copy.deepcopy(policy.state_dict())
    out = renewed(policy, FakeVLLM(folder)).sample(prompts, 2, Sampling(max_new_tokens=6))
    assert torch.allclose(out.logprobs, policy.logprobs(prompts, out).detach(), atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "'localhost:8000' is not the address of a server"),
        ({"url": "http://a", "retries": -1}, "engine: retries=-1 must be 0 or more"),
        ({"sleep": True}, "give engine.url or start, too"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        Engine(**options)
