"""Stop strings with the tokenizers of several families: a completion ends where its text first contains one."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from enumerable import make_prompts
from enumerable import make_tokenizer as make_letters
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.models.stop_strings import StopStrings
from lit_rlhf.testbed.tokenizer import make_tokenizer as make_words
from lit_rlhf.tokenization import decode_completions

CORPUS = ["User: who wrote this?\n\nAssistant: stop here, 日本 café.\nUser: a stopper, isn't it?"] * 20


def wrap(backend: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **tokens)


def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2, Llama 3 and Qwen, with merges, a turn's end, and a special token that is not in any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<eos>", "<|im_end|>", "<|im_start|>"]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=specials, initial_alphabet=alphabet)
    )
    return wrap(backend, additional_special_tokens=specials[1:])


def sentencepiece() -> PreTrainedTokenizerFast:
    """Like Llama 2 and Mistral: words begin with a visible space, other characters are single bytes."""
    specials = ["<unk>", "<s>", "<eos>", *[f"<0x{byte:02X}>" for byte in range(256)], ""]
    words = ["▁", "▁User", ":", "st", "op", "▁stop", "per", "Us", "er", "▁a", "s", "a", "e", "▁▁▁▁"]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate([*specials, *words])}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return wrap(backend, unk_token="<unk>", bos_token="<s>")


def word_pieces() -> PreTrainedTokenizerFast:
    """Like BERT: lower case, and pieces that continue a word."""
    tokens = ["<unk>", "<eos>", "stop", "##per", "un", "##stop", ".", ",", "user", ":", "a", "##a", "'", "s"]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return wrap(backend, unk_token="<unk>")


FAMILIES = {
    "bytes": (byte_level, ["stop", "a", "\n\n", "User:", "<|im_end|>", "本", "é", " it", "top", "er, i", "?\nU"]),
    "alphabet": (tiny.make_tokenizer, ["a", "ab", "<|user|>", "é"]),
    "sentencepiece": (sentencepiece, ["stop", " stop", "a", "User:", "\n", "日", "é", "rs", "<eos>", "  ", "ope"]),
    "word pieces": (word_pieces, ["stopper", "unstop", "a.", ". a", "stop ", ":", "user a"]),
    "words": (make_words, ["a", "the ", ":", ". The", "<bos>", ", "]),
    "letters": (make_letters, ["a", "b c"]),
}
CASES = [(family, stop) for family, (_, stops) in FAMILIES.items() for stop in stops]


def random_completion(size: int, pieces: list[list[int]], seed: int) -> list[int]:
    draw = random.Random(seed)
    parts = [draw.choice(pieces) if draw.random() < 0.3 else [draw.randrange(size)] for _ in range(draw.randint(5, 50))]
    return [token for part in parts for token in part]


@pytest.mark.filterwarnings("ignore:sampling. the tokenizer can't encode")
@pytest.mark.parametrize(("family", "stop"), CASES)
def test_a_stop_string_is_found_at_the_first_token_whose_text_contains_it(family, stop):
    make, others = FAMILIES[family]
    tokenizer = make(4) if make is make_letters else make()
    pieces = [encode(tokenizer, text) for text in others]
    criterion, ends = StopStrings(tokenizer, [stop]), set()
    for seed in range(20):
        ids = random_completion(len(tokenizer), pieces, seed)
        texts = decode_completions(tokenizer, [ids[: t + 1] for t in range(len(ids))], skip_special_tokens=False)
        for t, text in enumerate(texts):
            before = t > 0 and stop in texts[t - 1]
            assert before or bool(criterion(torch.tensor([ids[: t + 1]]))) == (stop in text), (ids[: t + 1], text)
            if stop in text:
                ends.add(t)
                break
    assert ends, "the test has to meet the string"


def encode(tokenizer, text: str) -> list[int]:
    try:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception:
        return []


def test_rows_end_one_by_one():
    tokenizer = byte_level()
    rows = [encode(tokenizer, text)[-4:] for text in ("a stop", "stopper", "no one here", "x<|im_end|>")]
    width = min(map(len, rows))
    tokens = torch.tensor([row[-width:] for row in rows])
    expected = [any(s in tokenizer.decode(row) for s in ("op", "im_end")) for row in tokens.tolist()]
    assert StopStrings(tokenizer, ["op", "im_end"])(tokens).tolist() == expected
    assert True in expected and False in expected


def test_the_text_keeps_the_stop_string_and_the_completion_is_finished():
    tokenizer = make_words()
    policy = Policy(tiny.make_llama(len(tokenizer), initializer_range=0.1), tokenizer)
    prompts, length = make_prompts([9, 30], [40]), 24
    free = policy.sample(prompts, 16, Sampling(max_new_tokens=length))
    drawn = policy.sample(prompts, 16, Sampling(max_new_tokens=length, stop=["a"]))
    texts = decode_completions(tokenizer, drawn.ids())
    cut = 0
    for text, ids, whole, finished in zip(texts, drawn.ids(), free.ids(), drawn.finished.flatten(), strict=True):
        assert ids == whole[: len(ids)]
        assert finished == ("a" in text or ids[-1] == tokenizer.eos_token_id)
        cut += len(ids) < len(whole) and "a" in text
    assert cut > 16


def test_a_stop_string_that_the_tokenizer_can_not_encode_gives_a_warning():
    with pytest.warns(UserWarning, match=r"can't encode stop=\['émile'\]"):
        assert not StopStrings(make_words(), ["film", "émile"])(torch.tensor([[5, 6]])).any()


def test_few_rows_are_decoded(monkeypatch):
    """Also if the completion is long, and many of its tokens hold the last character of the stop string."""
    tokenizer = byte_level()
    criterion, decoded = StopStrings(tokenizer, ["wrote this?\nUser"]), []
    plain = criterion._decode
    monkeypatch.setattr(criterion, "_decode", lambda ids: decoded.append(len(ids)) or plain(ids))
    ids = encode(tokenizer, CORPUS[0].replace("日本 café", "") * 50)
    for t in range(1, len(ids)):
        criterion(torch.tensor([ids[:t]]))
    assert len(decoded) < len(ids) / 3
    assert sum(decoded) < 60 * len(decoded)
