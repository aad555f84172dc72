"""Pairs of completions for raters to compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from lit_rlhf.data import PromptData
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.testbed.raters import Raters
from lit_rlhf.testbed.world import Brief, write
from lit_rlhf.tokenization import decode_completions

NUM_SAMPLES = 4
MAX_NEW_TOKENS = 40


def sampled_pairs(
    policies: Sequence[Policy], rows: list[dict[str, str]], rounds: int, seed: int
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Pair samples of each prompt from random policies; in one pair of six, the second is by the grammar's writer."""
    rng = Random(f"pairs {seed}")
    for epoch in range(rounds):
        completions = [samples(policy, rows, seed, epoch) for policy in policies]
        for i, row in enumerate(rows):
            for j in range(0, NUM_SAMPLES, 2):
                first, second = rng.choice(completions)[i][j], rng.choice(completions)[i][j + 1]
                if rng.random() < 1 / 6:
                    second = write(Brief.parse(row["prompt"]), rng)
                yield row["prompt"], (first, second)


def samples(policy: Policy, rows: list[dict[str, str]], seed: int, epoch: int) -> list[list[str]]:
    """Sample `NUM_SAMPLES` completions of each prompt."""
    data = PromptData(val=rows, eval_batch_size=127)
    data.tokenizer = policy.tokenizer
    data.setup("validate")
    texts: list[str] = []
    for batch in data.val_dataloader():
        completions = policy.sample(batch, NUM_SAMPLES, Sampling(max_new_tokens=MAX_NEW_TOKENS), seed, epoch)
        texts += decode_completions(policy.tokenizer, completions.ids())
    return [texts[i : i + NUM_SAMPLES] for i in range(0, len(texts), NUM_SAMPLES)]


def written_pairs(rows: list[dict[str, str]], seed: int) -> Iterator[tuple[str, tuple[str, str]]]:
    """Pair two different completions of each prompt by the grammar's writer."""
    for row in rows:
        brief, rng = Brief.parse(row["prompt"]), Random(f"written {seed} {row['prompt']}")
        first = second = write(brief, rng)
        while second == first:
            second = write(brief, rng)
        yield row["prompt"], (first, second)


def with_preferred(rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Add a column `preferred`: of two completions by the grammar's writer, the one that the raters prefer."""
    rated = Raters().preferences(written_pairs(rows, seed), seed)
    return [{**row, "preferred": pair["chosen"]} for row, pair in zip(rows, rated, strict=True)]
