"""The probe accepts every sound model in every dtype, and refuses, with a warning, those that are wrong."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaModel
from transformers.models.llama import modeling_llama

from lit_rlhf.models import probe
from lit_rlhf.models.forward import ModelForward
from lit_rlhf.models.scalar import Critic, ScalarModel
from lit_rlhf.models.shared_prompt import prompt_of_row, shared_features
from tiny import make_llama

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(32, 1, 0.02), (64, 2, 0.1), (32, 2, 0.2), (64, 3, 0.05)]
FAMILIES = {"llama": 16, "qwen2": 16, "qwen3": 4, "gpt_neox": 4, "mixtral": 4}


def make_model(family: str, seed: int):
    hidden, layers, spread = SHAPES[seed % len(SHAPES)]
    sizes = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, initializer_range=spread)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=263, **sizes, **heads)).eval()


@torch.no_grad()
def differences(model) -> tuple[float, float]:
    """Return how much padding and a shared prompt change the logits, relative to their size."""
    forward = ModelForward(model)
    forward.head_apart = False
    prompts, tokens, expected, noise, change = probe.probe_plain(forward)
    shared = shared_features(forward, prompts, tokens, prompt_of_row(2, 2))
    size = probe.rms(expected)
    return change or noise / size, probe.rms(shared - expected) / size


@pytest.fixture(scope="module")
def sound_models() -> list:
    return [make_model(family, seed) for family, count in FAMILIES.items() for seed in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_sound_model_is_refused(sound_models, dtype):
    for model in sound_models:
        model = copy.deepcopy(model).to(dtype)
        forward = ModelForward(model)
        probe.probe_policy(forward)
        assert forward.shares_prompt and forward.head_apart
        assert max(differences(model)) < probe.rounding(forward) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_more_rounding_error_is_not_a_reason_to_refuse(sound_models, dtype, monkeypatch):
    """Padding often changes nothing in 16 bits, also where the path with a cache rounds in other places."""

    def rounded(*args):
        features = shared_features(*args)
        return features * (1 + torch.finfo(dtype).eps * torch.randn_like(features).sign())

    monkeypatch.setattr(probe, "shared_features", rounded)
    for model in sound_models[:4]:
        forward = ModelForward(copy.deepcopy(model).to(dtype))
        probe.probe_policy(forward)
        assert forward.shares_prompt


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_sound_critic_or_reward_model_is_refused(sound_models, dtype):
    """Its scores may be much smaller than the terms they are sums of, and then rounding is a large part of them."""
    for seed, model in enumerate(sound_models[:36:3]):
        config = copy.deepcopy(model.config)
        config.num_labels = 1
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            critic = Critic(AutoModelForSequenceClassification.from_config(config))
        critic.classifier.model.load_state_dict(model.model.state_dict())
        critic.classifier.score.weight.data -= critic.classifier.score.weight.mean()
        critic.to(dtype).probe()
        assert critic.shares_prompt


# Models that are wrong


def four_dimensional(attention_mask: Tensor, length: int, allowed: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    columns = attention_mask.shape[1]
    query, key = torch.arange(columns - length, columns).unsqueeze(1), torch.arange(columns)
    seen = allowed(query, key) & attention_mask.bool()[:, None, None]
    return seen | (query == key)


def attends_to_the_future(config, inputs_embeds, attention_mask, cache=None, position_ids=None):
    return four_dimensional(attention_mask, inputs_embeds.shape[1], lambda query, key: key > -1)


def forgets_its_window_with_a_cache(config, inputs_embeds, attention_mask, cache=None, position_ids=None):
    length = inputs_embeds.shape[1]
    window = 4 if length == attention_mask.shape[1] else 99
    return four_dimensional(attention_mask, length, lambda query, key: (key <= query) & (query - key < window))


def attends_to_padding(config, inputs_embeds, attention_mask, cache=None, position_ids=None):
    mask = torch.ones_like(attention_mask)
    return four_dimensional(mask, inputs_embeds.shape[1], lambda query, key: key <= query)


plain_forward = LlamaModel.forward


def loses_a_key(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **kwargs):
    if cache is not None and cache.get_seq_length():
        attention_mask = attention_mask.index_fill(1, torch.tensor([2]), 0)
    return plain_forward(self, input_ids, attention_mask, position_ids, cache, **kwargs)


def takes_the_cache_of_another_row(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **kwargs):
    if cache is not None and cache.get_seq_length():
        cache.reorder_cache(torch.arange(len(input_ids)).flip(0))
    return plain_forward(self, input_ids, attention_mask, position_ids, cache, **kwargs)


WRONG_MASKS = [attends_to_the_future, forgets_its_window_with_a_cache, attends_to_padding]
WRONG_FORWARDS = [loses_a_key, takes_the_cache_of_another_row]


@contextmanager
def wrong(fault) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if fault in WRONG_MASKS:
            patch.setattr(modeling_llama, "create_causal_mask", fault)
        else:
            patch.setattr(LlamaModel, "forward", fault)
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", [*WRONG_MASKS, *WRONG_FORWARDS])
def test_a_wrong_model_is_refused_with_a_warning(fault, dtype):
    message = "does not ignore padding" if fault is attends_to_padding else "samples without a cache, which is slow"
    for seed in range(1, 4):
        forward = ModelForward(make_model("llama", seed).to(dtype))
        with wrong(fault):
            assert max(differences(forward.model)) > 2 * probe.rounding(forward)
            with pytest.warns(UserWarning, match=message):
                probe.probe_policy(forward)
        assert fault is attends_to_padding or not forward.shares_prompt


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_critic_is_refused_with_a_warning(dtype):
    config = make_llama(263).config
    config.num_labels = 1
    model = ScalarModel(
        AutoModelForSequenceClassification.from_config(config).to(dtype), "the reward model", trained=False
    )
    with wrong(loses_a_key), pytest.warns(UserWarning, match="the reward model computes each prompt once per"):
        model.probe()
    assert not model.shares_prompt


def test_a_model_that_overflows_float16_is_not_called_sensitive_to_padding():
    forward = ModelForward(make_llama(263).half())
    forward.model.model.embed_tokens.weight.data.fill_(torch.inf)
    with pytest.warns(UserWarning, match="without a cache, which is slow: its output is not finite in float16"):
        probe.probe_policy(forward)


def test_the_limit_follows_the_coarsest_product(monkeypatch):
    forward = ModelForward(make_llama(263))
    assert probe.rounding(forward) == probe.EXACT_ROUNDING
    with torch.autocast("cpu", torch.bfloat16):
        assert probe.rounding(forward) == probe.ROUNDING
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert probe.EXACT_ROUNDING < probe.rounding(forward) < probe.ROUNDING
    monkeypatch.undo()
    forward.model.model.layers[0].bfloat16()  # a trunk in 16 bits below a head in float32
    assert probe.rounding(forward) == probe.ROUNDING
