"""One token a word: the tokenizer of the testbed, built from its vocabulary."""

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
    """Every token, in the order of its id: the special ones, then the words in alphabetical order."""
    written = {word for pattern in grammar.PATTERNS for word in pattern if word not in grammar.CLASSES}
    asked = {*_BRIEF_WORDS, *w.TONES, *w.STANDINGS, *w.LENGTHS, *w.SUBJECTS, *w.ASPECT_FAMILY}
    return SPECIALS + tuple(sorted(written.union(asked, *grammar.CLASSES.values())))


def words_of(text: str) -> list[str]:
    """Cut a text where the tokenizer cuts it: words and marks."""
    return re.findall(r"\w+|[^\w\s]", text)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer. Prompts start with `<bos>`; no space is written before a mark when it decodes."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Replace(" :", ":")])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
