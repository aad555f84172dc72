"""Gradient checkpointing: the same values and gradients from less memory, with the prompt still shared."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

from lit_rlhf.errors import InputError
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference
from lit_rlhf.models.scalar import Critic
from lit_rlhf.types import Completions, Prompts
from tiny import make_llama, make_tokenizer

TOKENIZER = make_tokenizer()
SIZE = len(TOKENIZER)
GEMMA = dict(num_key_value_heads=2, head_dim=8, layer_types=["sliding_attention", "full_attention"] * 2)
FAMILIES = {
    "llama": {},
    "gpt2": {},  # gives its layers the cache by position
    "mixtral": {"router_jitter_noise": 0.3, "num_key_value_heads": 4},
    "gemma3_text": {**GEMMA, "sliding_window": 4},
    "gemma4_text": {  # layers that read the keys of others
        **GEMMA,
        "global_head_dim": 8,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": SIZE,
        "hidden_size_per_layer_input": 8,
    },
    "qwen3_next": {},  # has no cache to share
}


def make_input(n=2, k=3, prompt=8, length=7):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, SIZE, (n, prompt), generator=generator)
    mask, drawn = torch.ones(n, prompt, dtype=torch.bool), torch.ones(n, k, length, dtype=torch.bool)
    mask[0, :3], drawn[0, 0, 4:], drawn[1, 1, 1:] = False, False, False
    completions = torch.randint(7, SIZE, (n, k, length), generator=generator)
    return Prompts(tokens, mask, torch.arange(n)), Completions(
        completions, drawn, torch.zeros(n, k, length), drawn.all(-1)
    )


def value_and_gradients(model, compute):
    model.zero_grad()
    values = compute(*make_input())
    (values * torch.arange(1, values.shape[-1] + 1)).sum().backward()
    return [values.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(a, b):
    assert len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.filterwarnings("ignore:Qwen3NextForCausalLM computes each prompt once per completion")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name == "qwen3_next" else []) for name in FAMILIES]
)
def test_values_and_gradients_are_the_same_in_every_family(family):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    options = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **FAMILIES[family]}
    config = AutoConfig.for_model(family, vocab_size=SIZE, **sizes, initializer_range=0.3, **options)
    policy = Policy(AutoModelForCausalLM.from_config(config), TOKENIZER)
    expected = value_and_gradients(policy, policy.logprobs)
    policy.model_forward.checkpoint(True)
    assert_equal(value_and_gradients(policy, policy.logprobs), expected)


@pytest.mark.parametrize("kind", ["all weights", "lora", "values", "scores", "bfloat16"])
def test_values_and_gradients_are_the_same_for_every_use(kind):
    if kind in ("values", "scores"):
        torch.manual_seed(0)
        config = make_llama(SIZE).config
        config.num_labels = 1
        model = Critic(LlamaForSequenceClassification(config))
        compute = model.values if kind == "values" else model.score
    else:
        model = Policy(make_llama(SIZE), TOKENIZER, {"r": 2, "init_lora_weights": False} if kind == "lora" else None)
        compute = model.logprobs
    with torch.autocast("cpu", enabled=kind == "bfloat16"):
        expected = value_and_gradients(model, compute)
        model.model_forward.checkpoint(True)
        assert_equal(value_and_gradients(model, compute), expected)
        model.model_forward.checkpoint(False)
        assert_equal(value_and_gradients(model, compute), expected)


def saved_elements(policy, inputs) -> int:
    """Return how many numbers the backward pass holds besides weights."""
    held, weights = {}, {p.data_ptr() for p in policy.parameters()}

    def pack(tensor):
        if tensor.is_floating_point() and tensor.data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes() // 4)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = policy.logprobs(*inputs).sum()
    del loss
    return sum(size for _, size in held.values())


def test_a_prompt_is_computed_once_and_little_is_kept():
    policy, inputs = Policy(make_llama(SIZE, layers=6), TOKENIZER), make_input(n=2, k=8, prompt=64, length=4)
    policy.probe()
    passes = []
    policy.causal_lm.model.layers[0].register_forward_hook(lambda layer, args, output: passes.append(args[0].shape))
    before = saved_elements(policy, inputs)
    policy.model_forward.checkpoint(True)
    passes.clear()
    assert saved_elements(policy, inputs) < before / 4
    assert [tuple(shape[:2]) for shape in passes] == [(2, 64), (16, 3)]


def test_passes_without_gradient_are_not_changed(monkeypatch):
    policy, (prompts, completions) = Policy(make_llama(SIZE), TOKENIZER), make_input()
    policy.model_forward.checkpoint(True)
    reference = Reference.of(policy)
    monkeypatch.setattr("lit_rlhf.models.forward.recomputed", lambda *args: pytest.fail("layers are checkpointed"))
    with torch.no_grad():
        policy.logprobs(prompts, completions)
    reference.logprobs(prompts, completions)


def test_a_model_without_such_layers_is_refused():
    policy = Policy(make_llama(SIZE), TOKENIZER)
    policy.model_forward.model = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="gradient_checkpointing: a Linear has no layers for it"):
        policy.model_forward.checkpoint(True)
