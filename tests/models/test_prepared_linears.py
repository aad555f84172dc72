"""Linear layers with prepared weights: the same numbers, and the layers are restored afterwards."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from enumerable import make_prompts
from lit_rlhf.models import cpu
from lit_rlhf.models.decoders import prepared_linears
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling
from tiny import make_tokenizer

TOKENIZER = make_tokenizer()
SHAPE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def make_policy(lora=None, **options) -> Policy:
    torch.manual_seed(0)
    settings = dict(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.1)
    config = AutoConfig.for_model("llama", **settings, **SHAPE, **options)
    return Policy(AutoModelForCausalLM.from_config(config), TOKENIZER, lora)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the packed weights."""
    shapes, original = [], cpu.pack

    def watched(weight, bias):
        shapes.append(tuple(weight.shape))
        return original(weight, bias)

    assert cpu.packing_works(torch.float32)
    monkeypatch.setattr(cpu, "pack", watched)
    return shapes


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}])
def test_a_policy_samples_the_same_with_and_without(lora, calls, monkeypatch):
    policy, prompts = make_policy(lora), make_prompts([5, 6, 7], [8, 9], [14])
    sampling = Sampling(max_new_tokens=12)
    ours = policy.sample(prompts, 3, sampling)
    layer = [(256, 256)] * 2 + [(512, 256)] * 2 + [(256, 512)]  # keys and values are too small
    packable = sorted([*layer, *layer, (len(TOKENIZER), 256)])
    assert sorted(calls) == packable
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    plain = policy.sample(prompts, 3, sampling)
    assert len(calls) == len(packable)
    assert ours.ids() == plain.ids()
    torch.testing.assert_close(ours.logprobs, plain.logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 256), (2, 1, 256), (1, 5, 256)])
def test_a_layer_computes_the_same(dtype, shape):
    if not cpu.packing_works(dtype):
        pytest.skip(f"oneDNN has no {dtype} on this processor")
    layer, rows = nn.Linear(256, 300).to(dtype), torch.randn(shape).to(dtype)
    with torch.no_grad(), prepared_linears(nn.Sequential(layer)):
        assert "forward" in vars(layer)
        found = layer(rows)
    assert "forward" not in vars(layer) and found.dtype == dtype
    torch.testing.assert_close(found, layer(rows), atol=8 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("onednn", [True, False])
def test_under_autocast_the_weight_is_cast_once(onednn, monkeypatch):
    layer, rows = nn.Linear(256, 300), torch.randn(3, 256)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = layer(rows)
        with prepared_linears(layer):
            found = layer(rows)
            assert "forward" in vars(layer) and casts(lambda: layer(rows)) < casts(lambda: Other.forward(layer, rows))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def casts(compute) -> int:
    """Return how many numbers are cast."""
    with Casts() as counted:
        compute()
    return counted.numbers


class Casts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.numbers += args[0].numel()
        return function(*args, **(kwargs or {}))


def test_current_weights_are_used_and_layers_are_restored_after_an_error():
    layer, rows = nn.Linear(256, 300), torch.randn(3, 256)
    for _ in range(2):
        with torch.no_grad(), prepared_linears(layer):
            torch.testing.assert_close(layer(rows), nn.functional.linear(rows, layer.weight, layer.bias))
        with torch.no_grad():
            layer.weight.mul_(-2)
    with pytest.raises(KeyError), prepared_linears(layer):
        raise KeyError
    assert "forward" not in vars(layer)


class Other(nn.Linear):
    """A linear layer that computes something else."""


def patched_linear() -> nn.Linear:
    layer = nn.Linear(256, 300)
    layer.forward = lambda rows: rows  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(8, 8),
        Other(256, 300),
        patched_linear(),
        nn.Linear(256, 300, device="meta"),
        nn.Linear(256, 300).double(),
    ],
    ids=["small", "another kind", "patched", "meta device", "float64"],
)
def test_other_layers_stay_as_they_are(layer):
    before = vars(layer).get("forward")
    with prepared_linears(layer):
        assert vars(layer).get("forward") is before


def test_without_the_operations_nothing_changes(monkeypatch):
    def missing(*args):
        raise AttributeError

    monkeypatch.setattr(cpu, "pack", missing)
    cpu.packing_works.cache_clear()
    layer = nn.Linear(256, 300)
    with prepared_linears(layer):
        assert "forward" not in vars(layer)
    cpu.packing_works.cache_clear()
