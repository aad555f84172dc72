"""Values of critics and scores of reward models, by the fast path and the plain one."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, OPTConfig, OPTForCausalLM

import lit_rlhf
from enumerable import make_prompts
from lit_rlhf import functional as F
from lit_rlhf.algorithms.vanilla_pg import new_value_head
from lit_rlhf.models.scalar import Critic, value_head
from lit_rlhf.types import Preferences
from runs import grouped, make_data, make_module, make_trainer
from tiny import checkpoint_activations, make_llama, make_tokenizer

SIZE = len(make_tokenizer())
COMMON = dict(vocab_size=SIZE, num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SHAPE = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
ARCHITECTURES = {
    "llama": SHAPE,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    "qwen2": SHAPE,
    "qwen3": SHAPE,
    "mistral": dict(SHAPE, sliding_window=4),
}


def make_critic(kind: str = "llama", **config) -> Critic:
    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, **{**COMMON, **ARCHITECTURES[kind], "initializer_range": 0.2, **config})
    return Critic(AutoModelForSequenceClassification.from_config(settings))


def make_input() -> Preferences:
    generator = torch.Generator().manual_seed(0)
    prompts = make_prompts([5, 6, 7], [8, 9, 10, 11, 12, 13], [14])
    mask = torch.arange(5) < torch.tensor([[5, 1], [3, 2], [4, 5]]).unsqueeze(-1)
    return Preferences(prompts, torch.randint(7, SIZE, (3, 2, 5), generator=generator).where(mask, 0), mask)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_value_of_a_token_is_read_just_before_it(kind):
    critic, batch = make_critic(kind), make_input()
    values = critic.values(batch.prompts, batch)
    assert critic.shares_prompt
    assert (values[~batch.mask] == 0).all()
    for i, j in [(i, j) for i in range(3) for j in range(2)]:
        prompt = batch.prompts.tokens[i][batch.prompts.mask[i]]
        completion = batch.tokens[i, j][batch.mask[i, j]]
        hidden = critic.model.base_model(torch.cat([prompt, completion]).unsqueeze(0)).last_hidden_state[0]
        expected = critic.model.score(hidden[len(prompt) - 1 : -1]).squeeze(-1)
        torch.testing.assert_close(values[i, j][batch.mask[i, j]], expected, atol=2e-5, rtol=0)


def test_the_fast_path_has_the_gradient_of_the_plain_one():
    batch, gradients = make_input(), []
    for shares in (True, False):
        critic = make_critic()
        critic.model_forward.shares_prompt = shares
        (critic.values(batch.prompts, batch) ** 2).sum().backward()
        gradients.append({n: p.grad for n, p in critic.named_parameters() if p.grad is not None})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-5 * gradient.abs().max().item() + 1e-7, rtol=0)


class TestRewardModelTraining:
    """Bradley-Terry loss of pairs that share their prompt, against one plain `transformers` forward per completion."""

    @pytest.fixture(params=[None, {"r": 2, "init_lora_weights": False}], ids=["all weights", "lora"])
    def module(self, request, tiny):
        module = make_module("RewardModeling", tiny, lora=request.param)
        torch.manual_seed(0)
        module.configure_model()
        return module

    @staticmethod
    def gradients(module, scores):
        module.zero_grad()
        loss = F.bradley_terry_loss(*scores.unbind(1)).sum()
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

    @staticmethod
    def plain_scores(module, batch):
        def score(i, j):
            prompt, completion = batch.prompts.tokens[i], batch.tokens[i, j]
            ids = torch.cat([prompt[batch.prompts.mask[i]], completion[batch.mask[i, j]]]).unsqueeze(0)
            return module.reward_model.model(input_ids=ids).logits[0, 0]

        return torch.stack([torch.stack([score(i, j) for j in range(2)]) for i in range(3)])

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["shared", "checkpointing"])
    def test_loss_and_gradient_are_those_of_a_plain_forward(self, module, checkpointing):
        batch = make_input()
        loss, expected = self.gradients(module, self.plain_scores(module, batch))
        if checkpointing:
            checkpoint_activations(module.reward_model.classifier)
        actual_loss, actual = self.gradients(module, module.scores(batch))
        assert actual.keys() == expected.keys()
        torch.testing.assert_close(actual_loss, loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, atol=1e-5 * gradient.abs().max().item() + 1e-7, rtol=0)

    def test_a_prompt_is_computed_once_for_both_completions(self, module):
        batch, seen = make_input(), []
        module.reward_model.probe()
        embeddings = module.reward_model.classifier.get_input_embeddings()
        embeddings.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0].numel()))
        self.gradients(module, module.scores(batch))
        assert seen == [batch.prompts.tokens.numel(), batch.tokens.numel()]

    def test_a_completion_that_ends_with_the_padding_id_is_read_at_its_end(self, module):
        batch = make_input()
        batch = batch.replace(tokens=batch.tokens.masked_fill(batch.tokens == batch.tokens[0, 0, 4], 0))
        module.reward_model.config.pad_token_id = None
        with torch.no_grad():
            expected = self.plain_scores(module, batch)
            for pad in (0, 2):
                module.reward_model.config.pad_token_id = pad
                for shares in (True, False):
                    module.reward_model.model_forward.shares_prompt = shares
                    torch.testing.assert_close(module.scores(batch), expected, atol=1e-5, rtol=0)


def test_a_critic_from_a_policy_starts_at_zero_and_one_from_a_reward_model_keeps_its_head(tiny, tmp_path):
    batch = make_input()
    assert (Critic.from_pretrained(tiny).values(batch.prompts, batch) == 0).all()
    expected = make_critic()
    expected.model.save_pretrained(tmp_path)
    loaded = Critic.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.score.weight, expected.model.score.weight)
    values = [critic.values(batch.prompts, batch) for critic in (loaded, expected)]
    torch.testing.assert_close(*values, atol=1e-5, rtol=0)


def test_lora_trains_an_adapter_and_the_head(tiny):
    critic = Critic.from_pretrained(tiny, lora={"r": 2})
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name or "score" in name for name in trained)
    assert any("score" in name for name in trained)
    batch = make_input()
    assert (critic.values(batch.prompts, batch) == 0).all()


def test_trained_weights_on_a_frozen_bfloat16_trunk_are_float32(tiny):
    """Steps of a typical learning rate would be rounded away."""
    critic = Critic.from_pretrained(tiny, lora={"r": 2}, dtype="bfloat16")
    head = make_module("PPO", tiny, critic="head", lora={"r": 2}, load={"dtype": "bfloat16"})
    head.configure_model()
    for module in (critic, head):
        trained = {p.dtype for p in module.parameters() if p.requires_grad}
        assert trained == {torch.float32} and {p.dtype for p in module.parameters()} > trained
    batch = make_input()
    assert critic.values(batch.prompts, batch).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:2 updates per rollout")
def test_a_head_on_a_bfloat16_policy_trains(tiny, tmp_path):
    module = make_module("PPO", tiny, critic="head", lora={"r": 2}, load={"dtype": "bfloat16"}, num_minibatches=2)
    trainer = make_trainer(tmp_path, max_steps=4, limit_val_batches=0)
    trainer.fit(module, make_data("PPO"))
    assert module.critic.weight.abs().max() > 1e-3


def test_a_head_has_the_input_of_the_output_layer(tiny):
    """It is narrower than the hidden states in some models, such as OPT-350m."""
    shape = dict(hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16)
    model = OPTForCausalLM(OPTConfig(vocab_size=len(make_tokenizer()), do_layer_norm_before=False, **shape))
    policy, head, batch = lit_rlhf.Policy(model, make_tokenizer()), new_value_head(model), make_input()
    values = value_head(head, policy.features(batch.prompts, batch), batch)
    assert policy.chunks_logits and values.shape == batch.mask.shape


def test_a_critic_with_other_token_ids_is_refused(tiny, tmp_path):
    make_critic().model.save_pretrained(tmp_path / "other")
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    tokenizer.save_pretrained(tmp_path / "other")
    module = make_module("PPO", tiny, critic=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"the critic .*other' has id .* and the policy has"):
        make_trainer(tmp_path, max_steps=1).fit(module, make_data("PPO"))


def test_unsuitable_critics_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="has 2 labels"):
        make_critic(num_labels=2)
    make_critic(vocab_size=50).model.save_pretrained(tmp_path / "small")
    module = make_module("PPO", tiny, critic=str(tmp_path / "small"))
    with pytest.raises(ValueError, match=f"the critic embeds 50 token ids and the policy {SIZE}"):
        make_trainer(tmp_path, max_steps=1).fit(module, make_data("PPO"))
    policy = lit_rlhf.Policy(make_llama(SIZE), make_tokenizer())
    with pytest.raises(ValueError, match="is in memory"):
        lit_rlhf.VanillaPG(policy, rewards=[lit_rlhf.rewards.Length(maximum=3)])
    for source in ("hed", "./nowhere"):
        module = make_module("VanillaPG", tiny, critic=source)
        with pytest.raises(ValueError, match=f"critic='{source}' can't be loaded: give 'policy', 'head', a folder"):
            make_trainer(tmp_path, max_steps=1).fit(module, make_data("VanillaPG"))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("PPO", {"gae_lambda": 1.5}, "gae_lambda=1.5 must be between 0 and 1"),
        ("PPO", {"clip_range": 0.0}, "clip_range=0.0 must be above 0"),
        ("PPO", {"clip_range": 1.5}, "clip_range=1.5 is no lower bound"),
        ("PPO", {"clip_range_vf": 0.0}, "clip_range_vf=0.0 must be above 0"),
        ("PPO", {"clip_range": float("nan")}, "clip_range=nan must be above 0"),
        ("VanillaPG", {"vf_coef": float("nan")}, "vf_coef=nan must be above 0"),
        ("RLOO", {"missing_eos_penalty": float("nan")}, "missing_eos_penalty=nan must be 0 or more"),
        ("DPO", {"beta": float("inf")}, "beta=inf must be a finite number above 0"),
        ("PPO", {"clip_range_vf": -1.0}, "clip_range_vf=-1.0 must be above 0"),
        ("VanillaPG", {"critic_lr": -1.0}, "critic_lr=-1.0 must be above 0"),
        ("VanillaPG", {"vf_coef": 0.0}, "vf_coef=0.0 must be above 0"),
        ("RAFT", {"num_samples": 1}, "num_samples=1 must be at least 2"),
        ("RAFT", {"sample_minibatches": 2}, "sample_minibatches=2 can't"),
        ("RAFT", {"kl_penalty": "k2_loss"}, "use kl_penalty='k1_reward'"),
        ("PPO", {"clip_range": 0.3, "importance_ratio": False}, "clip_range=0.3 has no effect with importance_ratio"),
        ("Reinforce", {"baseline_decay": 0.5}, "baseline_decay=0.5 has no effect with baseline='mean'"),
        ("RLOO", {"kl_coef": float("inf")}, "kl_coef=inf must be a number of 0 or more"),
        ("RLOO", {"kl_penalty": "k4"}, "kl_penalty='k4' must be one of k1_reward, k2_loss"),
    ],
)
def test_bad_options_are_refused(name, options, sentence, tiny):
    with pytest.raises(ValueError, match=sentence):
        make_module(name, tiny, **options)


def test_an_adapter_or_a_model_of_two_labels_is_refused_as_critic(tiny, tmp_path):
    lit_rlhf.Policy.from_pretrained(tiny, lora={"r": 2}).save(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter.*merge it first"):
        Critic.from_pretrained(tmp_path / "adapter")
    settings = AutoConfig.for_model("llama", **{**COMMON, **SHAPE, "num_labels": 2})
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="has 2 labels"):
        Critic.from_pretrained(tmp_path / "two")


def test_a_critic_of_fewer_positions_is_refused(tiny, tmp_path):
    make_critic(vocab_size=SIZE, max_position_embeddings=8).model.save_pretrained(tmp_path / "short")
    module = make_module("PPO", tiny, critic=str(tmp_path / "short"))
    with pytest.raises(ValueError, match="exceed the 8 positions of the critic"):
        make_trainer(tmp_path, max_steps=1).fit(module, make_data("PPO"))


def test_a_gradient_clip_val_of_zero_clips_nothing(tiny, tmp_path):
    module = make_module("PPO", tiny, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))  # no decay of weights
    trainer = make_trainer(tmp_path, max_steps=1, gradient_clip_val=0.0)
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer.fit(module, make_data("PPO"))
    assert any(not torch.equal(p, before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("critic", ["policy", "head"])
def test_policy_and_critic_are_clipped_separately(critic, tiny, tmp_path):
    norms = {}

    class Norms(lit_rlhf.PPO):
        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            for group in optimizer.param_groups:
                norms[group["name"]] = float(torch.nn.utils.get_total_norm([p.grad for p in group["params"]]))

    options = dict(rewards=[lambda completions, **kwargs: [9.0 * len(c) for c in completions]], max_new_tokens=4)
    module = Norms(str(tiny), critic=critic, critic_lr=0.125, vf_coef=50.0, **grouped(options))
    trainer = make_trainer(tmp_path, max_steps=1, gradient_clip_val=0.25)
    trainer.fit(module, make_data("PPO"))
    assert norms == {"policy": pytest.approx(0.25, rel=1e-3), "critic": pytest.approx(0.25, rel=1e-3)}
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [pytest.approx(1e-5), 0.125]
    assert {"train/grad_norm", "train/critic_grad_norm"} <= trainer.callback_metrics.keys()


def test_the_first_update_of_several_is_exactly_on_policy(tiny, tmp_path):
    """Its ratios compare the training forward with itself; later ones do not."""
    ratios = []

    class Ratios(lit_rlhf.PPO):
        def policy_loss(self, part):
            ratios.append((part.logprobs.detach() - part.old_logprobs)[part.completions.mask].abs().max().item())
            return super().policy_loss(part)

    options = dict(rewards=[lambda completions, **kwargs: [float(len(c)) for c in completions]], max_new_tokens=4)
    sgd = dict(optimizer=lambda params: torch.optim.SGD(params, lr=0.05))
    module = Ratios(str(tiny), **grouped({"num_minibatches": 4, **options}), **sgd)
    trainer = make_trainer(tmp_path, max_steps=2, accumulate_grad_batches=2, limit_val_batches=0)
    trainer.fit(module, make_data("PPO"))
    assert ratios[:2] == [0.0, 0.0] and min(ratios[2:]) > 1e-3


def test_later_passes_compare_with_the_log_probabilities_before_the_first(tiny, tmp_path):
    """The ratio is 1 in the first pass and no longer in the second, however the passes are cut."""
    ratios = {}
    for minibatches in (1, 2):
        seen = ratios.setdefault(minibatches, [])

        class Ratios(lit_rlhf.PPO):
            def policy_loss(self, part, seen=seen):
                sampled = part.completions.logprobs
                assert (part.old_logprobs - sampled).abs().max() < 1e-4  # those of the policy that sampled
                seen.append(float((part.logprobs.detach() - sampled).abs().max()))
                return super().policy_loss(part)

        options = dict(rewards=[lambda completions, **kwargs: [float(len(c)) for c in completions]], max_new_tokens=4)
        sgd = dict(optimizer=lambda params: torch.optim.SGD(params, lr=0.05))
        module = Ratios(
            str(tiny), critic="head", **grouped({"update_epochs": 2, "num_minibatches": minibatches, **options}), **sgd
        )
        make_trainer(tmp_path, max_steps=2 * minibatches).fit(module, make_data("PPO"))
    assert ratios[1][0] < 1e-4 and ratios[1][1] > 1e-3
    assert ratios[2][0] < 1e-4 and min(ratios[2][1:]) > 1e-3


def trained_critic(folder) -> Critic:
    critic = Critic.from_pretrained(folder)
    torch.nn.init.normal_(critic.classifier.score.weight)
    return critic


@pytest.mark.parametrize("make", [Critic.from_pretrained, trained_critic], ids=["new head", "trained head"])
def test_the_probe_is_the_same_under_autocast(make, tiny):
    """Else a resumed run in bf16-mixed would compute its prompts another way than the run before."""
    critic = make(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        critic.probe()
    assert critic.shares_prompt


def test_the_probe_sees_a_wrong_cache_through_a_head_of_zeros(tiny, monkeypatch):
    import lit_rlhf.models.shared_prompt as shared_prompt

    select = shared_prompt.select_cache_rows

    def disturbed(cache, rows):
        chosen = select(cache, rows)
        for layer in chosen.layers:
            layer.keys = torch.randn_like(layer.keys)
        return chosen

    monkeypatch.setattr(shared_prompt, "select_cache_rows", disturbed)
    critic = Critic.from_pretrained(tiny)
    with pytest.warns(UserWarning, match="computes each prompt once per completion, which is slow"):
        critic.probe()
    assert not critic.shares_prompt
