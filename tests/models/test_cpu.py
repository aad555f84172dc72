"""Attention on a CPU: the same results as those of `transformers`, with less work and memory."""

from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from enumerable import make_prompts
from lit_rlhf.models import cpu as subject
from lit_rlhf.models.cpu import attention, cpu_attention
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling
from tiny import make_llama, make_tokenizer

ROWS, PAST, FEATURES = 3, 4, 8


class Layer(nn.Module):
    """The attributes of a layer that an attention function reads."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def make_inputs(heads, key_heads, length, masked, dtype=torch.float32):
    """Query, key, value and mask of a few tokens; with a mask, or for a single token, they follow past ones."""
    torch.manual_seed(0)
    seen = length + PAST if masked is not None or length == 1 else length
    query = torch.randn(ROWS, heads, length, FEATURES, dtype=dtype)
    key, value = torch.randn(2, ROWS, key_heads, seen, FEATURES, dtype=dtype)
    mask = torch.ones(ROWS, 1, length, seen, dtype=torch.bool).tril(seen - length)
    mask[0, :, :, :2] = False  # padding
    if masked == "number":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return [x.requires_grad_() for x in (query, key, value)], None if masked is None else mask


def with_gradients(function, layer, inputs, mask):
    attended, weights = function(layer, *inputs, mask, scaling=0.3)
    assert weights is None
    return [attended, *torch.autograd.grad(attended.float().square().sum(), inputs)]


@pytest.mark.parametrize("masked", [None, "bool", "number"])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("heads, key_heads", [(4, 2), (4, 4), (6, 1)])
class TestEqualToTransformers:
    def test_in_float32(self, heads, key_heads, length, masked):
        inputs, mask = make_inputs(heads, key_heads, length, masked)
        layer = Layer(heads // key_heads)
        ours = with_gradients(attention, layer, inputs, mask)
        theirs = with_gradients(sdpa_attention_forward, layer, inputs, mask)
        assert ours[0].is_contiguous()
        torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("autocast", [False, True, "after float32 rotations"])
    def test_no_less_precise_in_bfloat16(self, heads, key_heads, length, masked, autocast):
        inputs, mask = make_inputs(heads, key_heads, length, masked, torch.bfloat16)
        if isinstance(autocast, str):
            inputs[:2] = (x.detach().float().requires_grad_() for x in inputs[:2])
        layer = Layer(heads // key_heads)
        exact_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
        exact = with_gradients(sdpa_attention_forward, layer, [x.double() for x in inputs], exact_mask)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(autocast)):
            ours, theirs = (with_gradients(f, layer, inputs, mask) for f in (attention, sdpa_attention_forward))
        for our, their, right in zip(ours, theirs, exact, strict=True):
            assert our.dtype == their.dtype
            error, usual = ((x.double() - right).abs().mean() for x in (our, their))
            assert error <= 1.1 * usual


def test_the_backward_pass_does_not_keep_repeated_keys():
    (query, key, value), mask = make_inputs(8, 2, 5, "bool")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attention(Layer(4), query, key, value, mask)
    assert {x.shape for x in saved} >= {query.shape, key.shape}
    repeated = (ROWS, 8, 5 + PAST, FEATURES)
    assert not [x for x in saved if x.shape == repeated]
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sdpa_attention_forward(Layer(4), query, key, value, mask)
    assert [x for x in saved if x.shape == repeated]  # otherwise nothing is gained any more


def test_the_backward_pass_in_bfloat16_is_computed_in_float32():
    inputs, mask = make_inputs(4, 2, 5, "bool", torch.bfloat16)
    floats = [x.float().detach().requires_grad_() for x in inputs]
    ours = with_gradients(attention, Layer(2), inputs, mask)
    exact = with_gradients(attention, Layer(2), floats, mask)
    assert torch.equal(ours[0], exact[0].bfloat16())
    attended, _ = attention(Layer(2), *floats, mask)
    given = torch.randn(attended.shape).bfloat16()
    [a, *_] = torch.autograd.grad(attention(Layer(2), *inputs, mask)[0], inputs, given)
    [b, *_] = torch.autograd.grad(attended, floats, given.float())
    assert torch.equal(a, b.bfloat16())


@pytest.mark.parametrize(
    "special",
    [{"position_bias": torch.randn(1, 4, 5, 5)}, {"cache": object()}, {"softcap": 30.0}],
    ids=["position_bias", "cache", "softcap"],
)
def test_unknown_arguments_are_passed_to_transformers(special, monkeypatch):
    answer = torch.zeros(1), None
    asked = Mock(return_value=answer)
    monkeypatch.setattr(subject, "sdpa_attention_forward", asked)
    layer, (inputs, _) = Layer(2), make_inputs(4, 2, 5, None)
    assert attention(layer, *inputs, None, **special) == answer
    asked.assert_called_once_with(layer, *inputs, None, 0.0, None, None, **special)


def test_causal_attention_to_more_keys_than_tokens_is_passed_to_transformers():
    inputs, _ = make_inputs(4, 2, 5, "bool")  # more keys than tokens, and no mask
    ours, theirs = (function(Layer(2), *inputs, None)[0] for function in (attention, sdpa_attention_forward))
    torch.testing.assert_close(ours, theirs)


def test_other_devices_use_transformers(monkeypatch):
    answer = torch.zeros(1), None
    asked = Mock(return_value=answer)
    monkeypatch.setattr(subject, "sdpa_attention_forward", asked)
    layer, (inputs, _) = Layer(2), make_inputs(4, 2, 5, None)
    inputs = [x.to("meta") for x in inputs]
    assert attention(layer, *inputs, None) == answer
    asked.assert_called_once_with(layer, *inputs, None, 0.0, None, None)


class TestModels:
    @pytest.fixture
    def calls(self, monkeypatch):
        """The calls of our attention."""
        watched = Mock(side_effect=attention)
        monkeypatch.setattr(subject, "attention", watched)
        return watched

    def test_a_policy_uses_it_and_the_configuration_stays(self, calls):
        policy = Policy(make_llama(263), make_tokenizer(), {"r": 2, "target_modules": "all-linear"})
        before = policy.causal_lm.config.to_dict()
        policy.sample(make_prompts([9, 8], [7]), 2, Sampling(max_new_tokens=3))
        assert calls.called and policy.causal_lm.config.to_dict() == before
        calls.reset_mock()
        policy.causal_lm(torch.tensor([[7, 8]]))
        assert not calls.called  # the user's own calls

    def test_the_choice_of_another_attention_stays(self, calls):
        policy = Policy(make_llama(263), make_tokenizer())
        policy.causal_lm.set_attn_implementation("eager")
        policy.sample(make_prompts([9, 8], [7]), 2, Sampling(max_new_tokens=3))
        assert not calls.called

    def test_a_registered_function_of_the_same_name_stays(self, calls, monkeypatch):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", own := Mock(side_effect=sdpa_attention_forward))
        Policy(make_llama(263), make_tokenizer()).sample(make_prompts([9, 8]), 2, Sampling(max_new_tokens=3))
        assert own.called and not calls.called

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma3_text", "mistral", "opt"])
    def test_logits_stay_the_same(self, family, calls):
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        if family in ("qwen3", "gemma3_text", "mistral"):
            sizes |= dict(num_key_value_heads=2, head_dim=8)
        if family == "gpt2":
            sizes = dict(n_embd=32, n_layer=2, n_head=4)
        config = AutoConfig.for_model(family, vocab_size=64, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()
        ids, mask = torch.randint(3, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
        mask[0, :3] = 0
        before = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        with cpu_attention():
            logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        assert calls.called
        torch.testing.assert_close(logits, before)
