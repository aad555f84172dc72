"""Validation rows and judges with known preferences, for tests of evaluation."""

import lit_rlhf
from runs import make_trainer

OPINIONS = {"better": 1.0, "same": 0.0, "worse": -1.0, "nobody can tell": None}


def judge(completions, **kwargs):
    """Score the opponents of the tests as in OPINIONS, and completions of the policy as 0."""
    return [OPINIONS.get(text, 0.0) for text in completions]


def token_sum(completion_ids, **kwargs):
    return [sum(ids) / 100 for ids in completion_ids]


def predict(module, rows, root) -> list[dict]:
    batches = make_trainer(root).predict(module, datamodule=lit_rlhf.PromptData(val=rows, batch_size=2))
    return [row for batch in batches for row in batch]


def rows_of(*opponents):
    return [{"prompt": f"film {i}", "reference": text} for i, text in enumerate(opponents)]


def prefers(choose):
    """Return a pairwise judge that answers `choose(completion, opponent)` for each pair."""

    def pairs(prompts, completions, opponents, **kwargs):
        return [choose(a, b) for a, b in zip(completions, opponents, strict=True)]

    pairs.pairwise = True
    return pairs


def validate(module, rows, root, trainer=None, **options) -> dict[str, float]:
    data = lit_rlhf.PromptData(val=rows, batch_size=2, **options)
    (metrics,) = make_trainer(root, **(trainer or {})).validate(module, datamodule=data, verbose=False)
    return metrics
