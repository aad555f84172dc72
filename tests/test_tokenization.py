"""From text to ids and back, with tokenizers and templates that have their own ways with the ends of a text."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_rlhf.models.policy import Policy
from lit_rlhf.tokenization import decode_completions, encode_completion, encode_prompt
from tiny import make_llama

DIALOGUE = "Human: hi\n\nAssistant:"


@pytest.fixture
def spacing():
    """As Llama 2's: a space is put before every text, and taken off what is decoded."""
    letters = "▁\n:;" + "".join(map(chr, range(ord("A"), ord("z") + 1)))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters, "▁g", "▁go"])}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "g"), ("▁g", "o")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("completion", [" good", "good", "\ngood"])
def test_a_completion_is_read_as_what_follows_its_prompt(completion, spacing):
    ids = encode_prompt(spacing, DIALOGUE) + encode_completion(spacing, DIALOGUE, completion, finished=False)
    assert ids == spacing(DIALOGUE + completion)["input_ids"]


def test_a_text_does_not_depend_on_those_beside_it(spacing, monkeypatch):
    """One of them may melt into what stands before it."""
    ids = [encode_completion(spacing, DIALOGUE, text) for text in (" good", "melting")]
    whole = type(spacing).batch_decode

    def melt(self, rows, **kwargs):
        return [text.replace("\nmelting", "?") for text in whole(self, rows, **kwargs)]

    monkeypatch.setattr(type(spacing), "batch_decode", melt)
    assert decode_completions(spacing, ids) == [" good", "melting"]


@pytest.mark.parametrize("completion", [" good", "good", "\ngood"])
def test_a_completion_is_written_as_it_stands_behind_its_prompt(completion, spacing):
    ids = encode_completion(spacing, DIALOGUE, completion)
    assert ids[-1] == spacing.eos_token_id
    assert decode_completions(spacing, [ids, ids[:-1]]) == [completion] * 2


def test_a_text_without_a_prompt_begins_as_texts_do(spacing):
    assert encode_completion(spacing, "", "good", finished=False) == spacing("good")["input_ids"]


def test_a_turn_ends_as_its_template_ends_it(tokenizer):
    """With a token that is not the tokenizer's EOS, as Gemma's and Phi's do; what stands behind it is not sampled."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    prompt, answer = [{"role": "user", "content": "U"}], [{"role": "assistant", "content": "good"}]
    written = {
        finished: tokenizer.decode(encode_completion(tokenizer, prompt, answer, finished)) for finished in (True, False)
    }
    assert written == {True: "good<end>", False: "good"}


def test_a_turn_that_the_prompt_leaves_open_is_continued(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    prompt = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "a good"}]
    answer = [{"role": "assistant", "content": " film"}]
    written = encode_prompt(tokenizer, prompt), encode_completion(tokenizer, prompt, answer)
    assert [tokenizer.decode(ids) for ids in written] == ["<|user|>U<eos><|assistant|>a good", " film<eos>"]


@pytest.mark.parametrize("behind", ["", "\n", "\n<eos>"])
def test_a_policy_stops_where_its_template_ends_a_turn(behind, tokenizer, tmp_path):
    """Also where a base model's configuration knows nothing of that, and so does what it is saved as."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>" + behind + "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    policy = Policy(make_llama(len(tokenizer)), tokenizer)
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert policy.eos_ids == [tokenizer.eos_token_id, end]
    policy.save(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [2, end]


def test_a_special_token_within_a_turn_does_not_end_it(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    prompt, answer = [{"role": "user", "content": "U"}], [{"role": "assistant", "content": "a<bos>b"}]
    assert tokenizer.decode(encode_completion(tokenizer, prompt, answer)).endswith("a<bos>b<eos>")
