"""Which attention backends the forward passes may use on CUDA, seen from inside them."""

import pytest
import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForSequenceClassification

from enumerable import make_prompts
from lit_rlhf.models.forward import ModelForward
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.models.scalar import Critic
from tiny import checkpoint_activations, make_llama, make_tokenizer


@pytest.fixture
def backends(monkeypatch):
    """Let models report a CUDA device while they compute on the CPU, and return the backends that are on in them."""
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    seen: set[tuple[str, ...]] = set()
    names = ("flash", "mem_efficient", "math", "cudnn")
    states = {name: getattr(cuda, f"{name}_sdp_enabled") for name in names}
    before = ModelForward.fast_attention

    def on_cuda(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelForward, "device", torch.device("cuda"))
            return before(self)

    monkeypatch.setattr(ModelForward, "fast_attention", on_cuda)
    yield (
        lambda model: (
            model.register_forward_pre_hook(lambda *_: seen.add(tuple(name for name in names if states[name]())))
            and seen
        )
    )
    assert all(state() for state in states.values())


def attention_of(model) -> torch.nn.Module:
    return model.model.layers[0].self_attn


def make_policy() -> Policy:
    return Policy(make_llama(263), make_tokenizer())


def run(policy: Policy) -> None:
    prompts = make_prompts([9, 8, 7], [6])
    drawn = policy.sample(prompts, 2, Sampling(max_new_tokens=3))
    policy.logprobs(prompts, drawn).sum().backward()


def test_cudnn_is_off_in_the_forward_passes_of_a_policy_and_on_afterwards(backends):
    policy = make_policy()
    seen = backends(attention_of(policy.causal_lm))
    run(policy)
    assert seen == {("flash", "mem_efficient", "math")}


def test_cudnn_is_off_in_critics_and_reward_models(backends):
    critic = Critic(LlamaForSequenceClassification(type(make_llama(263).config)(**small())))
    seen = backends(attention_of(critic.classifier))
    critic.plain_scores([[5, 6, 7], [8]]).sum().backward()
    prompts = make_prompts([9, 8, 7], [6])
    critic.score(prompts, make_policy().sample(prompts, 2, Sampling(max_new_tokens=3)))
    assert seen == {("flash", "mem_efficient", "math")}


def small() -> dict:
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "pad_token_id",
    )
    return {name: getattr(make_llama(263).config, name) for name in names} | {"num_labels": 1}


def test_cudnn_stays_off_for_the_second_forward_pass_of_checkpointing(backends):
    policy = make_policy()
    seen = backends(attention_of(policy.causal_lm))
    checkpoint_activations(policy.model)
    try:
        run(policy)
        assert seen == {("flash", "mem_efficient", "math")}
    finally:
        cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("chosen", ["variable", "context", "cudnn alone"])
def test_a_choice_of_the_user_stays(backends, chosen, monkeypatch):
    policy = make_policy()
    seen = backends(attention_of(policy.causal_lm))
    if chosen == "variable":
        monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
        run(policy)
        assert seen == {("flash", "mem_efficient", "math", "cudnn")}
        return
    kept = [SDPBackend.CUDNN_ATTENTION] if chosen == "cudnn alone" else [SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel([*kept, SDPBackend.MATH]):
        run(policy)
    assert seen == {("math", "cudnn")}


def test_nothing_changes_on_a_cpu(monkeypatch):
    monkeypatch.setattr(cuda, "enable_cudnn_sdp", lambda on: pytest.fail("not on a CPU"))
    run(make_policy())
