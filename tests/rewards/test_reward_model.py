import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
)

from lit_rlhf.rewards import RewardModel, Scorer, Weighted
from lit_rlhf.tokenization import encode_completion, encode_prompt
from tiny import make_llama, make_tokenizer

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CONFIGS = {
    "llama": lambda **kw: LlamaConfig(**SHAPE, **kw),
    "qwen2": lambda **kw: Qwen2Config(**SHAPE, **kw),
    "gpt2": lambda **kw: GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=kw.pop("max_position_embeddings"), **kw
    ),
}


def make_model(kind="llama", labels=1, positions=128, seed=0):
    torch.manual_seed(seed)
    config = CONFIGS[kind](
        vocab_size=len(make_tokenizer()),
        num_labels=labels,
        max_position_embeddings=positions,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,  # the trap: padding that looks like the end of a completion
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def saved(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def rows():
    """Rows of many lengths; truncated ones end with tokens that could be mistaken for padding."""
    prompts = ["", "a", "a longer prompt", "why?", "x" * 60, "b", "c", "d"]
    completions = ["yes", "no " * 10, "", "because<pad>", "y", "what<unk>", "odd<bos>", "fine!"]
    return prompts, completions, [True, True, True, False, False, False, False, False]


def plain_scores(model, tokenizer, prompts, completions, finished):
    """Score one row at a time, without padding, at its last token."""
    model.config.pad_token_id = None
    scores = []
    for prompt, completion, ended in zip(prompts, completions, finished, strict=True):
        ids = encode_prompt(tokenizer, prompt)
        ids += encode_completion(tokenizer, prompt, completion, ended, parse_special_tokens=False)
        scores.append(model(torch.tensor([ids])).logits.item())
    return torch.tensor(scores)


@pytest.mark.parametrize("pad", ["<eos>", "<pad>", None])
@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_in_a_batch_changes_nothing(kind, pad, rows, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad
    model = make_model(kind)
    reward = RewardModel(saved(tmp_path, model, tokenizer), batch_size=5)
    expected = plain_scores(model, tokenizer, *rows)
    assert expected.std() > 0.1  # different scores, so that reading the wrong token is noticed
    scores = reward(*rows)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    in_ones = RewardModel(tmp_path, batch_size=1)(*rows)
    torch.testing.assert_close(in_ones, expected, atol=1e-4, rtol=1e-4)


def some_of_each(rows, samples=4):
    """The same prompts, with several completions each, in an order that splits groups."""
    prompts, completions, finished = rows
    count = len(prompts)
    places = [(i, (i + 3 * j) % count) for j in range(samples) for i in range(count)]
    return (
        [prompts[i] + "x" * 20 * (i % 3) for i, _ in places],
        [completions[j] for _, j in places],
        [finished[j] for _, j in places],
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_completions_of_a_prompt_share_it(kind, rows):
    tokenizer, model, seen = make_tokenizer(), make_model(kind), []
    given = some_of_each(rows)
    expected = plain_scores(model, tokenizer, *given)
    reward = RewardModel(model, tokenizer, batch_size=11)
    reward.setup("cpu")
    model.get_input_embeddings().register_forward_hook(lambda m, i, output: seen.append(i[0].numel()))
    torch.testing.assert_close(reward(*given), expected, atol=1e-4, rtol=1e-4)
    shared = sum(seen)
    seen.clear()
    reward._scorer.model_forward.shares_prompt = False
    torch.testing.assert_close(reward(*given), expected, atol=1e-4, rtol=1e-4)
    assert shared < 0.8 * sum(seen)


def test_a_model_that_changes_its_score_afterwards_uses_its_own_forward(tokenizer):
    class Larger(LlamaForSequenceClassification):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 10
            return output

    model = make_model()
    model.__class__ = Larger
    reward = RewardModel(model, tokenizer)
    with pytest.warns(
        UserWarning, match="Larger' computes each prompt once per completion, .* its output would differ"
    ):
        scores = reward(["why?"] * 4, ["a", "b", "a", "b"])
    alone = torch.cat([reward(["why?"], [text]) for text in ("a", "b", "a", "b")])
    torch.testing.assert_close(scores, alone, atol=1e-4, rtol=1e-4)


def test_a_prompt_is_not_shared_if_that_saves_nothing(tokenizer):
    reward = RewardModel(make_model(), tokenizer)
    reward.setup("cpu")
    alike = [([1], [5] * length) for length in (1, 9, 30) * 9]  # padding would cost more than the prompts
    assert reward._scorer.shares_prompt and reward._shared_batches(alike, size=7) is None
    assert reward._shared_batches([([1] * 20, [5]), ([1] * 20, [6])], size=7) == [[0, 1]]


def test_a_prompt_is_truncated_separately_for_each_completion(rows):
    tokenizer, model = make_tokenizer(), make_model()
    prompts, completions, finished = some_of_each(rows)
    reward = RewardModel(model, tokenizer, max_length=12)
    one_by_one = [reward([p], [c], [f]) for p, c, f in zip(prompts, completions, finished, strict=True)]
    torch.testing.assert_close(reward(prompts, completions, finished), torch.cat(one_by_one), atol=1e-4, rtol=1e-4)


def test_inputs_of_similar_length_are_batched_together(tokenizer):
    model, shapes = make_model(), []
    reward = RewardModel(model, tokenizer, batch_size=32)
    reward.setup("cpu")
    model.get_input_embeddings().register_forward_hook(lambda m, i, output: shapes.append(output.shape[:2]))
    prompts, completions = [chr(65 + i) for i in range(40)], ["a" * (1 + i * 11 % 40) for i in range(40)]
    together = reward(prompts, completions)
    assert [rows for rows, _ in shapes] == [8, 8, 8, 8, 8]
    reward.batch_size = 1
    torch.testing.assert_close(together, reward(prompts, completions), atol=1e-4, rtol=1e-4)


def test_conversations_use_the_chat_template_of_the_reward_model(tokenizer):
    model = make_model()
    prompt, completion = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yes"}]
    score = RewardModel(model, tokenizer)([prompt], [completion])
    text = "<|user|> hi<eos>\n<|assistant|> yes<eos>"
    model.config.pad_token_id = None
    expected = model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]))
    torch.testing.assert_close(score, expected.logits[0])


def test_a_model_in_memory_keeps_its_configuration_and_its_weights(tokenizer, rows):
    model = make_model("gpt2").train()  # its dropout must be off
    before = copy.deepcopy(model.config.to_dict())
    weights = copy.deepcopy(model.state_dict())
    reward = RewardModel(model, tokenizer)
    assert torch.equal(reward(*rows), reward(*rows))
    assert model.config.to_dict() == before
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values(), strict=True))
    assert not reward(*rows).requires_grad and all(p.grad is None for p in model.parameters())


def test_autocast_and_the_default_dtype_do_not_change_the_scores(tokenizer, rows):
    reward = RewardModel(make_model(), tokenizer)
    expected = reward(*rows)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            scores = reward(*rows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(scores, expected)


def test_the_dtype_of_the_weights_is_an_option(rows, tmp_path):
    folder = saved(tmp_path, make_model())
    scores = {dtype: RewardModel(folder, dtype=dtype)(*rows) for dtype in ("auto", "float32", "bfloat16")}
    assert torch.equal(scores["auto"], scores["float32"])
    assert not torch.equal(scores["bfloat16"], scores["float32"])
    assert scores["bfloat16"].dtype == torch.float32


def test_weights_are_loaded_by_setup_and_are_not_pickled(tmp_path, rows):
    reward = RewardModel(saved(tmp_path, make_model()))
    fresh = len(pickle.dumps(reward))
    assert not isinstance(reward, torch.nn.Module)
    scorer = Scorer([Weighted(reward, 0.5)])
    scorer.setup("cpu")
    assert len(pickle.dumps(reward)) == fresh < 10_000
    copied = pickle.loads(pickle.dumps(reward))
    assert torch.equal(copied(*rows), reward(*rows))
    prompts, completions, finished = rows
    scores = scorer(prompts, [[text] for text in completions], [[[2]]] * len(prompts), [[end] for end in finished])
    assert torch.equal(scores.component_rewards["reward_model"].flatten(), reward(*rows))


def test_an_input_that_is_too_long_is_an_error_or_truncated_at_its_start(tokenizer):
    model = make_model(positions=16)
    prompts, completions = ["0123456789", "0123456789abc"], ["hello", "hello"]
    with pytest.raises(ValueError, match=r"19 tokens exceeds the 16 positions .* max_length=16"):
        RewardModel(model, tokenizer)(prompts, completions)
    cut = RewardModel(model, tokenizer, max_length=16)(prompts, completions)
    assert cut[0] == pytest.approx(RewardModel(model, tokenizer)(["0123456789"], ["hello"]).item(), abs=1e-5)
    assert cut[1] == pytest.approx(RewardModel(model, tokenizer)(["3456789abc"], ["hello"]).item(), abs=1e-5)


def no_weights(*args, **kwargs):
    raise AssertionError("weights were loaded")


def test_a_wrong_model_is_refused_before_weights_are_loaded(tmp_path, monkeypatch, llama):
    two = saved(tmp_path / "two", make_model(labels=2))
    causal = saved(tmp_path / "causal", llama)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", no_weights)
    with pytest.raises(ValueError, match="two' has 2 labels: give a model with one label"):
        RewardModel(two)
    with pytest.raises(ValueError, match="causal' is a LlamaForCausalLM, not a sequence-classification model"):
        RewardModel(causal)
    with pytest.raises(ValueError, match="is an adapter: merge it first"):
        RewardModel(tmp_path / "adapter")
    with pytest.raises(ValueError, match="nowhere': there is no such folder"):
        RewardModel(str(tmp_path / "nowhere"))


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    model = make_model()
    saved(tmp_path, model)
    causal = make_llama(len(make_tokenizer()))
    causal.config.num_labels = 1
    causal.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"lacks the weights \['score.weight'\]"):
        RewardModel(tmp_path).setup("cpu")


def test_wrong_arguments_are_refused(tokenizer):
    model = make_model(positions=16)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        RewardModel(model)
    with pytest.raises(ValueError, match="batch_size of a reward model must be at least 1, not 0"):
        RewardModel(model, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match=r"max_length=17 does not fit .* it has 16 positions"):
        RewardModel(model, tokenizer, max_length=17)
    tokenizer.add_tokens(["more"])
    with pytest.raises(ValueError, match=r"has \d+ tokens, but the model embeds \d+"):
        RewardModel(model, tokenizer).setup("cpu")
