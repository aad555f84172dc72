"""Log-probabilities: every fast path equals the plain one; padding, dropout and new adapters change nothing."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import lit_rlhf
from enumerable import make_prompts
from lit_rlhf.models import logprobs as logprobs_module
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.types import Completions, Demonstrations, Prompts
from runs import make_data, make_trainer
from tiny import checkpoint_activations, make_llama, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT calls it

SIZE = len(make_tokenizer())
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def make_input(seed: int = 0, k: int = 3, t: int = 7) -> tuple[Prompts, Completions]:
    """Prompts and completions of uneven length, of arbitrary tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(7, SIZE, shape, generator=generator)

    prompts = make_prompts(*[ids(length).tolist() for length in (3, 8, 5)])
    mask = torch.arange(t) < torch.randint(1, t + 1, (3, k, 1), generator=generator)
    tokens = ids(3, k, t).where(mask, 0)
    return prompts, Completions(tokens, mask, torch.zeros(3, k, t), mask[..., -1])


def value_and_gradient(policy: Policy, prompts: Prompts, completions, temperature: float = 1.0):
    """Log-probabilities, and the gradient of a weighted sum of them by parameter."""
    policy.zero_grad()
    logprobs = policy.logprobs(prompts, completions, temperature)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    (logprobs * weights).sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def assert_alike(actual, expected) -> None:
    torch.testing.assert_close(actual[0], expected[0], atol=2e-5, rtol=0)
    assert actual[1].keys() == expected[1].keys()
    scale = max(float(g.abs().max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, atol=1e-5 * scale, rtol=0, msg=name)


def make_policy(**config) -> Policy:
    return Policy(make_llama(SIZE, **config), make_tokenizer())


@pytest.mark.parametrize(("family", "own"), [("llama", {}), ("mistral", {"sliding_window": 6})])
def test_rows_grouped_by_length_give_the_same_values_and_gradients(family, own):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **own)
    config = AutoConfig.for_model(family, vocab_size=SIZE, num_key_value_heads=2, initializer_range=0.2, **shape)
    policy = Policy(AutoModelForCausalLM.from_config(config), make_tokenizer())
    (prompts, completions), seen = make_input(k=12, t=20), []
    policy.probe()
    policy.causal_lm.get_input_embeddings().register_forward_hook(lambda m, i, output: seen.append(output.shape[:2]))
    grouped = value_and_gradient(policy, prompts, completions)
    assert len(seen) == 5 and sum(rows for rows, _ in seen[1:]) == 36
    assert sum(rows * columns for rows, columns in seen[1:]) < 0.8 * 36 * 19
    policy.model_forward.shares_prompt = False
    assert_alike(grouped, value_and_gradient(policy, prompts, completions))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_chunked_logprobs_are_the_unchunked_ones(rows, tied, monkeypatch):
    policy, (prompts, completions) = make_policy(tie_word_embeddings=tied), make_input()
    expected = value_and_gradient(policy, prompts, completions, 0.7)
    monkeypatch.setattr(logprobs_module, "LOGITS_AT_ONCE", rows * SIZE)
    held: list[int] = []
    policy.causal_lm.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: held.append(output.numel())
    )
    assert_alike(value_and_gradient(policy, prompts, completions, 0.7), expected)
    assert len(held) > 2 and max(held) <= rows * SIZE


def test_logits_are_computed_only_for_unmasked_tokens():
    policy, (prompts, completions) = make_policy(), make_input()
    policy.probe()
    held: list[int] = []
    policy.causal_lm.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: held.append(output.numel() // SIZE)
    )
    policy.logprobs(prompts, completions)
    assert held == [int(completions.mask.sum())]


def test_gradient_checkpointing_uses_the_plain_path_and_gives_the_same_gradients():
    policy, (prompts, completions) = make_policy(), make_input()
    expected = value_and_gradient(policy, prompts, completions)
    drawn = policy.sample(prompts, 2, Sampling(max_new_tokens=5))
    checkpoint_activations(policy.model)
    policy.train()
    lengths = []
    policy.causal_lm.get_input_embeddings().register_forward_hook(lambda m, i, output: lengths.append(output.shape[1]))
    assert_alike(value_and_gradient(policy, prompts, completions), expected)
    assert lengths == [8 + 7]  # prompt and completion in one, without a cache
    assert policy.sample(prompts, 2, Sampling(max_new_tokens=5)).ids() == drawn.ids()


@pytest.mark.parametrize(
    ("family", "noise"),
    [("mixtral", {"router_jitter_noise": 0.3, "num_key_value_heads": 4}), ("persimmon", {"attention_dropout": 0.3})],
)
def test_training_only_randomness_of_a_model_is_switched_off(family, noise):
    """Noise in expert routing; dropout that the model reads from its configuration."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model(family, vocab_size=SIZE, **sizes, **noise, initializer_range=0.3)
    policy, (prompts, _) = Policy(AutoModelForCausalLM.from_config(config), make_tokenizer()), make_input()
    drawn = policy.sample(prompts, 2, Sampling(max_new_tokens=5))
    for _ in range(2):
        torch.testing.assert_close(policy.logprobs(prompts, drawn), drawn.logprobs, atol=1e-4, rtol=0)
    assert policy.model.training


def test_a_model_that_checks_the_name_of_its_attention_stays_causal():
    """Gemma 4 slices queries under gradient checkpointing, which needs a mask even without padding."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=8)
    config = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=SIZE,
        vocab_size_per_layer_input=SIZE,
        hidden_size_per_layer_input=8,
        num_key_value_heads=2,
        global_head_dim=8,
        num_kv_shared_layers=2,
        final_logit_softcapping=30.0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.3,
        **sizes,
    )
    policy = Policy(AutoModelForCausalLM.from_config(config), make_tokenizer())
    checkpoint_activations(policy.model)
    prompts = make_prompts(*torch.randint(7, SIZE, (3, 10)).tolist())
    drawn = policy.sample(prompts, 2, Sampling(max_new_tokens=6, min_new_tokens=6))
    torch.testing.assert_close(policy.logprobs(prompts, drawn), drawn.logprobs, atol=1e-4, rtol=0)


def test_a_model_that_caps_its_logits_has_the_right_gradient():
    torch.manual_seed(0)
    settings = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=SIZE,
        num_key_value_heads=2,
        final_logit_softcapping=0.5,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    policy, (prompts, completions) = Policy(model, make_tokenizer()), make_input()
    actual = value_and_gradient(policy, prompts, completions)
    assert not policy.chunks_logits
    assert_alike(actual, plain_value_and_gradient(policy, prompts, completions))
    columns = []
    model.lm_head.register_forward_pre_hook(lambda module, args: columns.append(args[0].shape[1]))
    policy.logprobs(prompts, completions)
    assert columns == [1, completions.tokens.shape[-1] - 1]  # only the last column of a prompt


def plain_value_and_gradient(policy: Policy, prompts: Prompts, completions):
    """Compute the same by one unpadded forward pass per completion."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = policy.model

        def logprobs(self, prompts, completions, temperature):
            result = torch.zeros(completions.tokens.shape)
            for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(completions.tokens.shape[1])).tolist():
                prompt, answer = prompts.tokens[i][prompts.mask[i]], completions.tokens[i, j][completions.mask[i, j]]
                logits = self.model(torch.cat([prompt, answer]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
                scores = logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).squeeze(-1)
                result[i, j, : len(answer)] = scores
            return result

    return value_and_gradient(Plain(), prompts, completions)


# Padding


def test_a_model_that_ignores_the_attention_mask_is_warned_about():
    torch.manual_seed(0)
    config = AutoConfig.for_model("rwkv", vocab_size=SIZE, hidden_size=32, num_hidden_layers=2)
    policy = Policy(AutoModelForCausalLM.from_config(config), make_tokenizer())
    with (
        pytest.warns(UserWarning, match="RwkvForCausalLM does not ignore padding .*data.batch_size=1"),
        pytest.warns(UserWarning, match="RwkvForCausalLM computes each prompt once per completion"),
    ):
        policy.probe()
    assert policy.shares_prompt is False  # it ignores the cache, too


def test_extra_padding_changes_nothing():
    policy, (prompts, completions) = make_policy(), make_input()
    expected = value_and_gradient(policy, prompts, completions)
    wide = prompts.replace(
        tokens=torch.nn.functional.pad(prompts.tokens, (6, 0), value=9),
        mask=torch.nn.functional.pad(prompts.mask, (6, 0)),
    )
    longer = completions.map(lambda x: torch.nn.functional.pad(x, (0, 4)) if x.ndim == 3 else x)
    logprobs, gradients = value_and_gradient_of_first(policy, wide, longer, 7)
    assert_alike((logprobs, gradients), expected)
    drawn, drawn_wide = (policy.sample(p, 2, Sampling(max_new_tokens=6)) for p in (prompts, wide))
    assert drawn.ids() == drawn_wide.ids()


def value_and_gradient_of_first(policy, prompts, completions, t: int):
    policy.zero_grad()
    logprobs = policy.logprobs(prompts, completions)
    weights = torch.randn(*logprobs.shape[:2], t, generator=torch.Generator().manual_seed(1))
    (logprobs[..., :t] * weights).sum().backward()
    return logprobs.detach()[..., :t], {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["shared", "plain"])
def test_an_undefined_embedding_of_padding_is_harmless(checkpointing):
    policy, (prompts, completions) = make_policy(), make_input()
    if checkpointing:
        checkpoint_activations(policy.model)
    expected = value_and_gradient(policy, prompts, completions)
    drawn = policy.sample(prompts, 2, Sampling(max_new_tokens=6))
    with torch.no_grad():
        policy.causal_lm.get_input_embeddings().weight[0] = torch.nan
    assert_alike(value_and_gradient(policy, prompts, completions), expected)
    assert policy.sample(prompts, 2, Sampling(max_new_tokens=6)).ids() == drawn.ids()


@pytest.mark.parametrize("shared", [True, False])
def test_padding_may_exceed_learned_positions(shared):
    """Of two rows that fill all positions, one has a long prompt, the other a long completion."""
    config = AutoConfig.for_model(
        "gpt2", vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=12, pad_token_id=0, eos_token_id=2
    )
    policy = Policy(AutoModelForCausalLM.from_config(config).eval(), make_tokenizer())
    policy.probe()
    if not shared:
        policy.model_forward.shares_prompt = False
    prompts = make_prompts(list(range(5, 15)), [3, 4])
    tokens = torch.arange(20, 40).view(2, 1, 10)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :, 2:] = False
    together = policy.logprobs(prompts, Demonstrations(prompts, tokens, mask))
    for i in range(2):
        row = prompts.rows(slice(i, i + 1)).trim()
        length = int(mask[i].sum())
        alone = Demonstrations(row, tokens[i : i + 1, :, :length], mask[i : i + 1, :, :length])
        torch.testing.assert_close(together[i, :, :length], policy.logprobs(row, alone)[0], atol=1e-5, rtol=0)


# Dropout


@pytest.mark.parametrize("family", ["llama", "gpt2", "lora"])
def test_dropout_in_the_config_changes_nothing(family):
    prompts, completions = make_input()
    if family == "gpt2":
        config = AutoConfig.for_model(
            "gpt2", vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, eos_token_id=2,
            resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5,
        )  # fmt: skip
        policy = Policy(AutoModelForCausalLM.from_config(config), make_tokenizer())
    else:
        lora = {**LORA, "lora_dropout": 0.5, "init_lora_weights": False} if family == "lora" else None
        policy = Policy(make_llama(SIZE, attention_dropout=0.5), make_tokenizer(), lora)
    policy.train()
    first, again = (value_and_gradient(policy, prompts, completions) for _ in range(2))
    policy.eval()
    evaluated = value_and_gradient(policy, prompts, completions)
    for other in (again, evaluated):
        assert torch.equal(first[0], other[0])
        assert all(torch.equal(gradient, other[1][name]) for name, gradient in first[1].items())


# The reference


def trained_adapter() -> PeftModel:
    """An adapter that changes the model, like one that has been trained."""
    torch.manual_seed(3)
    return get_peft_model(make_llama(SIZE), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **LORA))


POLICIES = {
    "all weights": lambda: make_policy(),
    "new adapter": lambda: Policy(make_llama(SIZE), make_tokenizer(), LORA),
    "adapter passed in": lambda: Policy(trained_adapter(), make_tokenizer()),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", POLICIES)
def test_at_step_0_the_policy_equals_its_reference_exactly(kind, mode):
    policy, (prompts, completions) = POLICIES[kind](), make_input()
    reference = Reference.of(policy)
    getattr(policy, mode)()
    logprobs = policy.logprobs(prompts, completions, 0.7)
    assert logprobs.requires_grad
    assert torch.equal(logprobs.detach(), reference.logprobs(prompts, completions, 0.7))
    sampling = Sampling(max_new_tokens=5)
    assert policy.sample(prompts, 2, sampling).ids() == reference.sample(prompts, 2, sampling).ids()


@pytest.mark.parametrize("kind", POLICIES)
def test_the_reference_does_not_change_with_the_policy(kind):
    policy, (prompts, completions) = POLICIES[kind](), make_input()
    reference = Reference.of(policy)
    before = reference.logprobs(prompts, completions)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # the first step changes only one factor of a new adapter
        optimizer.zero_grad()
        policy.logprobs(prompts, completions).sum().backward()
        optimizer.step()
    assert (policy.logprobs(prompts, completions) - before).abs().max() > 0.1
    assert torch.equal(reference.logprobs(prompts, completions), before)
    assert not before.requires_grad


def test_under_a_new_adapter_the_reference_is_the_base_model_and_needs_no_copy():
    base, (prompts, completions) = make_policy(), make_input()
    policy = Policy(make_llama(SIZE), make_tokenizer(), {**LORA, "init_lora_weights": False})
    reference = Reference.of(policy)
    expected = base.logprobs(prompts, completions).detach()
    assert torch.equal(reference.logprobs(prompts, completions), expected)
    assert (policy.logprobs(prompts, completions) - expected).abs().max() > 0.1
    assert reference._policy is policy


def test_the_reference_of_the_next_run_includes_the_adapter_of_the_last(tmp_path):
    policy, (prompts, completions) = Policy(make_llama(SIZE), make_tokenizer(), LORA), make_input()
    trained = lit_rlhf.SFT(policy, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    make_trainer(tmp_path, max_steps=2).fit(trained, make_data("SFT"))
    reference = Reference.of(policy).logprobs(prompts, completions)
    assert torch.equal(reference, policy.logprobs(prompts, completions))
    assert (reference - make_policy().logprobs(prompts, completions)).abs().max() > 1e-3


def test_frozen_weights_are_shared_with_the_reference_and_not_copied():
    policy = Policy(trained_adapter(), make_tokenizer())
    copied = dict(Reference.of(policy)._policy.named_parameters())
    for name, parameter in policy.named_parameters():
        assert (copied[name] is parameter) != parameter.requires_grad
        assert not copied[name].requires_grad


# Models that need the plain path


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_a_kv_cache_uses_the_plain_path_with_a_warning():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba", vocab_size=SIZE, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0, eos_token_id=2
    )
    policy, (prompts, completions) = Policy(AutoModelForCausalLM.from_config(config), make_tokenizer()), make_input()
    with pytest.warns(UserWarning, match="MambaForCausalLM computes each prompt once per completion"):
        actual = value_and_gradient(policy, prompts, completions)
    assert policy.shares_prompt is False
    assert_alike(actual, plain_value_and_gradient(policy, prompts, completions))
    drawn = policy.sample(prompts, 3, Sampling(max_new_tokens=5))
    torch.testing.assert_close(drawn.logprobs, policy.logprobs(prompts, drawn).detach(), atol=2e-5, rtol=0)


def test_the_plain_path_samples_the_same_as_the_fast_one(monkeypatch):
    fast, plain = make_policy(), make_policy()

    def no_cache(*args, **kwargs):
        raise NotImplementedError("no cache here")

    fast.probe()
    monkeypatch.setattr("lit_rlhf.models.probe.shared_features", no_cache)
    prompts, _ = make_input()
    sampling = Sampling(max_new_tokens=9, temperature=1.3)
    expected = fast.sample(prompts, 4, sampling)
    with pytest.warns(UserWarning, match="without a cache, which is slow: NotImplementedError: no cache here"):
        drawn = plain.sample(prompts, 4, sampling)
    assert fast.shares_prompt and not plain.shares_prompt
    assert drawn.ids() == expected.ids()
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, atol=2e-5, rtol=0)


def test_sampling_options_of_a_model_that_does_not_sample_can_be_saved(tmp_path):
    model = make_llama(SIZE)
    model.generation_config.temperature = 0.7  # without do_sample, which `transformers` refuses to save
    Policy(model, make_tokenizer()).save(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.7
