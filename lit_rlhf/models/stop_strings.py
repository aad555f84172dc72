"""Stop strings, found in the decoded text, so that every tokenizer has them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.tokenization import decode_completions

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not yet a whole character."""


class StopStrings:
    """Finds completions whose text, special tokens included, contains a stop string since their newest token.

    The text is that of the tokenizer's own decoder, so a stop string may be part of a token, several tokens, a special
    token, or hold the space that a decoder puts between words. Few rows are decoded in full: the newest token must hold
    the last character of a stop string (or bytes of one), and the text of the last tokens the whole string.

    Args:
        tokenizer: The tokenizer.
        stop: The strings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.longest = max(map(len, self.stop))
        self._may_end = functools.cache(self._may_end)  # type: ignore[method-assign]
        unknown = [text for text in self.stop if self._is_unknown(text)]
        if unknown:
            rank_zero_warn(
                f"sampling: the tokenizer can't encode stop={unknown}, so perhaps no completion will contain it: give "
                "strings that the policy can write"
            )

    def __call__(self, tokens: Int[Tensor, "rows tokens"]) -> Bool[Tensor, " rows"]:
        """Return which of the completions, all of the same length, end with their newest token."""
        newest = tokens[:, -1].tolist()
        rows = [i for i, token in enumerate(newest) if self._may_end(token)]
        ended = torch.zeros(len(newest), dtype=torch.bool)
        for row, ids in zip(rows, tokens[rows].tolist(), strict=True):
            ended[row] = self._ends(ids)
        return ended.to(tokens.device)

    def _may_end(self, token: int) -> bool:
        """Whether a token may be the last of a stop string."""
        text = self._decode([token, token])  # twice: some decoders remove the space before the first word
        return INCOMPLETE in text or any(stop[-1] in text for stop in self.stop)

    def _ends(self, ids: list[int]) -> bool:
        tail = ids[-2 * self.longest - 8 :]
        text = self._decode(tail)
        if INCOMPLETE in text or len(text) < 2 * self.longest or self._contains_stop(text):
            text = text if len(tail) == len(ids) else self._decode(ids)
        return self._contains_stop(text)

    def _contains_stop(self, text: str) -> bool:
        return any(stop in text for stop in self.stop)

    def _decode(self, ids: list[int]) -> str:
        return decode_completions(self.tokenizer, [ids], skip_special_tokens=False)[0]

    def _is_unknown(self, text: str) -> bool:
        try:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception:  # `tokenizers` raises nothing narrower where there is no token for unknown text
            return True
        return not ids or self.tokenizer.unk_token_id in ids
