"""Tokenize prompts and completions, for data, rewards and policies alike.

Messages go through the tokenizer's chat template, and the special tokens in their text stay text. A completion ends
with the token that ends a turn in the template, or else with EOS, unless it was truncated: in reward-model training
exactly as in scoring. Completions are encoded and decoded as the continuation of a prompt: some tokenizers (Llama 2,
Mistral) add a space before every text that they encode and remove the first space of every text that they decode.
"""

from lit_rlhf.tokenization.chat import EncodedTurns
from lit_rlhf.tokenization.encode import (
    decode_completions,
    encode_completion,
    encode_prompt,
    encode_turns,
    end_ids,
    end_of_turn,
    pad_token_id,
)
from lit_rlhf.tokenization.left_out import left_out
from lit_rlhf.tokenization.template import check_template_kwargs
from lit_rlhf.tokenization.turns import split_turns

__all__ = [
    "EncodedTurns",
    "check_template_kwargs",
    "decode_completions",
    "encode_completion",
    "encode_prompt",
    "encode_turns",
    "end_ids",
    "end_of_turn",
    "left_out",
    "pad_token_id",
    "split_turns",
]
