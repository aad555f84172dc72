"""Rewards of the completions of a batch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import torch
from transformers import PreTrainedTokenizerBase, TrainerState

from lit_rlhf.evaluation.completions import as_completion, without_ends
from lit_rlhf.rewards import Scorer, Scores
from lit_rlhf.tokenization import decode_completions, encode_prompt, end_of_turn
from lit_rlhf.types import Completions, Prompts, Text

NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def score(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    completions: Completions,
    texts: list[list[Text]],
    state: TrainerState,
) -> Scores:
    """Return the rewards of every completion, on its device.

    Args:
        scorer: The rewards.
        tokenizer: The policy's tokenizer.
        prompts: The prompts.
        completions: Their completions.
        texts: The completions as text, `[prompt][sample]`.
        state: Progress of training.
    """
    n, k, length = completions.tokens.shape
    ids, finished = completions.ids(), completions.finished.tolist()
    nested = [ids[i * k : (i + 1) * k] for i in range(n)]
    texts_of_prompts = prompts.text or [""] * n
    scorer.check_hidden_tokens(ids, lambda: answer_tokens(tokenizer))
    raw = raw_texts(tokenizer, texts_of_prompts, nested) if scorer.special_tokens else None
    scores = scorer(texts_of_prompts, texts, nested, finished, prompts.columns, state, raw)
    scores = scores.to(completions.tokens.device)
    if scores.token_rewards is None:
        return scores
    missing = length - scores.token_rewards.shape[-1]  # columns that no completion fills
    return dataclasses.replace(scores, token_rewards=torch.nn.functional.pad(scores.token_rewards, (0, missing)))


def raw_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Text], completion_ids: list[list[list[int]]]
) -> list[list[Text]]:
    """Decode completions with their special tokens, `[prompt][sample]`, without the token that ends them."""
    special = _special(tokenizer)

    def decode(ids: list[int]) -> str:
        runs = [(names, list(run)) for names, run in itertools.groupby(ids, key=special.get)]
        texts = iter(decode_completions(tokenizer, [run for name, run in runs if name is None]))
        return "".join(next(texts) if name is None else name * len(run) for name, run in runs)

    return [
        [as_completion(prompt, decode(ids)) for ids in without_ends(tokenizer, group)]
        for prompt, group in zip(prompts, completion_ids, strict=True)
    ]


def answer_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the special tokens that may be part of an answer: not EOS, padding, ... or the markup of turns."""
    others = {getattr(tokenizer, f"{name}_token_id", None) for name in NAMED_TOKENS} | {end_of_turn(tokenizer)}
    with contextlib.suppress(Exception):  # no template, or one that rejects this prompt
        others.update(encode_prompt(tokenizer, [{"role": "user", "content": "a"}]))
    return {i: token for i, token in _special(tokenizer).items() if i not in others}


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def prediction_rows(
    prompts: Prompts, completions: Completions, texts: list[list[Text]], scores: Scores
) -> list[dict[str, Any]]:
    """Return one dict per completion with its prompt, text and rewards."""
    n, k = completions.finished.shape
    totals = scores.total().tolist()
    components = {name: values.tolist() for name, values in scores.component_rewards.items()}
    return [
        {
            "index": int(prompts.index[i]),
            "sample": j,
            "prompt": prompts.text[i],
            "completion": texts[i][j],
            "reward": totals[i][j],
            "component_rewards": {name: values[i][j] for name, values in components.items()},
            "finished": bool(completions.finished[i, j]),
        }
        for i in range(n)
        for j in range(k)
    ]
