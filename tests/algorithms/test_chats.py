"""What is learned of conversations, and that reward models read in use what they read in training."""

import pytest
import torch

import lit_rlhf
from families import make_family
from lit_rlhf.types import Demonstrations, Preferences
from runs import make_module, make_trainer
from tiny import make_llama


@pytest.fixture
def family_folder(tmp_path):
    """Return a function that saves a tiny policy with the tokenizer of a family."""

    def save(tokenizer):
        model = make_llama(len(tokenizer), pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
        model.save_pretrained(tmp_path / "policy")
        tokenizer.save_pretrained(tmp_path / "policy")
        return tmp_path / "policy"

    return save


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_only_the_assistants_tokens_have_loss(family_folder, tmp_path):
    """With masked tokens, SFT has the gradient of the same loss computed by hand."""
    module = make_module("SFT", family_folder(make_family("chatml")))
    chat = [user("q"), assistant("call"), {"role": "tool", "content": "42"}, assistant("answer")]
    data = lit_rlhf.DemonstrationData([{"messages": chat}] * 4, val=2, batch_size=2, assistant_turns="all")
    make_trainer(tmp_path, max_steps=1).fit(module, data)
    batch: Demonstrations = next(iter(data.val_dataloader()))
    hidden = ~batch.loss_mask & batch.mask
    assert "42" in module.tokenizer.decode(batch.tokens[0, 0][hidden[0, 0]])
    ids = torch.cat([batch.prompts.tokens, batch.tokens[:, 0]], dim=1)
    logprobs = module.policy.causal_lm(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    expected = -logprobs[:, batch.prompts.tokens.shape[1] - 1 :][batch.loss_mask[:, 0]].mean()
    with torch.no_grad():
        (row, _) = module.predict_step(batch, 0)
    assert row["loss"] == pytest.approx(float(expected.detach()), abs=1e-4)


def test_a_tools_answer_changes_no_log_ratio_but_what_it_is_read_with(family_folder, tmp_path):
    module = make_module("DPO", family_folder(make_family("chatml")))
    pair = {
        "prompt": [user("q")],
        "chosen": [assistant("a"), {"role": "tool", "content": "42"}, assistant("b")],
        "rejected": [assistant("c")],
    }
    data = lit_rlhf.PreferenceData([pair] * 4, val=2, batch_size=2)
    make_trainer(tmp_path, max_steps=1).fit(module, data)
    batch: Preferences = next(iter(data.val_dataloader()))
    ratios = module.policy.logprobs(batch.prompts, batch) - module.reference.logprobs(batch.prompts, batch)
    learned = ratios.masked_fill(~batch.loss_mask, 0).sum(-1)
    torch.testing.assert_close(module.log_ratios(batch), learned)
    assert (ratios.masked_fill(~batch.mask, 0).sum(-1)[:, 0] - learned[:, 0]).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("family", "pad"), [("chatml", "<|im_end|>"), ("chatml", "<eos>"), ("r1", "<eos>"), ("gpt2", None), ("gpt2", "!")]
)
def test_a_reward_model_reads_in_use_what_it_read_in_training(family, pad, family_folder, tmp_path):
    """Whatever the padding token is, and by the forward of `transformers` too where it has one."""
    tokenizer = make_family(family)
    tokenizer.pad_token = pad
    chat = tokenizer.chat_template is not None
    rows = [{"prompt": f"q{i}", "chosen": f" ab{i}! {'!' * i}", "rejected": f" no{i}!!!"} for i in range(8)]
    if chat:
        rows = [{k: [(user if k == "prompt" else assistant)(v.strip())] for k, v in row.items()} for row in rows]
    module = make_module("RewardModeling", family_folder(tokenizer))
    data = lit_rlhf.PreferenceData(rows, val=4, batch_size=4, max_completion_tokens=5, truncation="truncate")
    if chat:
        data = lit_rlhf.PreferenceData(rows, val=4, batch_size=4)
    make_trainer(tmp_path, max_steps=2).fit(module, data)
    module.save_model(tmp_path / "saved")
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        trained = module.scores(batch).flatten()
    pairs = [
        (row.example.prompt, c, ids)
        for row in data.val_set.rows
        for c, ids in zip(row.example.completions, row.completions, strict=True)
    ]
    texts = [text if chat else tokenizer.decode(ids) for _, text, ids in pairs]
    reward = lit_rlhf.RewardModel(tmp_path / "saved")
    used = reward([prompt for prompt, _, _ in pairs], texts, [chat] * len(pairs))
    torch.testing.assert_close(used, trained, atol=1e-4, rtol=1e-4)
    classifier = module.reward_model.classifier.eval()
    if (padding := classifier.config.pad_token_id) is not None:
        ids = [
            torch.cat([batch.prompts.tokens[i // 2][batch.prompts.mask[i // 2]], torch.tensor(end)])
            for i, (_, _, end) in enumerate(pairs)
        ]
        plain = classifier(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)).logits
        torch.testing.assert_close(plain.flatten().detach(), trained, atol=1e-4, rtol=1e-4)


def test_a_reward_model_reads_a_policys_own_words_as_text(monkeypatch):
    tokenizer = make_family("chatml", "<ans>")
    model = lit_rlhf.models.scalar.AutoModelForSequenceClassification.from_config(
        make_llama(len(tokenizer), num_labels=1, pad_token_id=None).config
    )
    reward, seen = lit_rlhf.RewardModel(model, tokenizer), []
    monkeypatch.setattr(reward, "_shared_batches", lambda rows, size: seen.extend(rows))
    for prompt, answer in ((user("q"), assistant("a<|im_end|>b<ans>")),):
        reward([[prompt], "q"], [[answer], "a<|im_end|>b<ans>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [ids.count(end) for _, ids in seen] == [1, 0]
    assert all(tokenizer.convert_tokens_to_ids("<ans>") in ids for _, ids in seen)


def test_a_reward_model_whose_template_refuses_is_named():
    tokenizer = make_family("gemma")
    model = lit_rlhf.models.scalar.AutoModelForSequenceClassification.from_config(
        make_llama(len(tokenizer), num_labels=1, pad_token_id=None).config
    )
    reward = lit_rlhf.RewardModel(model, tokenizer)
    with pytest.raises(
        ValueError, match=r"the reward model 'Llama.*' can't read the prompt .*be brief.*: no system role"
    ):
        reward([[{"role": "system", "content": "be brief"}, user("q")]], [[assistant("a")]])
