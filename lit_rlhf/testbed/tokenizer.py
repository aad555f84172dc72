"""Word-level tokenizer of the testbed, built from its vocabulary."""

from __future__ import annotations

import re
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_rlhf.testbed import grammar
from lit_rlhf.testbed import words as w

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
_BRIEF_WORDS = "A critic on of in the sentence sentences : , .".split()


@cache
def vocabulary() -> tuple[str, ...]:
    """Return all tokens in the order of their ids: special tokens, then words in alphabetical order."""
    completion_words = {word for pattern in grammar.PATTERNS for word in pattern if word not in grammar.CLASSES}
    prompt_words = {*_BRIEF_WORDS, *w.TONES, *w.REPUTATIONS, *w.LENGTHS, *w.SUBJECTS, *w.ASPECT_FAMILY}
    return SPECIALS + tuple(sorted(completion_words.union(prompt_words, *grammar.CLASSES.values())))


def words_of(text: str) -> list[str]:
    """Split a text as the tokenizer does: words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer. Prompts start with `<bos>`; decoding writes no space before punctuation."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Replace(" :", ":")])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
