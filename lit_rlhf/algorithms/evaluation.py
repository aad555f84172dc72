"""Scoring completions: for a rollout, and of held-out prompts for validation and test."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf import functional as F
from lit_rlhf.metrics import distinct_n
from lit_rlhf.rewards import Scorer
from lit_rlhf.text import encode_completion
from lit_rlhf.types import Completions, Prompts, Text

if TYPE_CHECKING:
    from lit_rlhf.algorithms.online import Online

VALIDATION_EPOCH = 2**31
"""The epoch in the address of validation's sampling noise: the same at every validation, and none of training's."""

NUM_EXAMPLES = 8


def completion_texts(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, completions: Completions) -> list[Text]:
    """Decode completions as rewards see them: strings, or a message each where the prompts are conversations."""
    texts = tokenizer.batch_decode(completions.ids(), skip_special_tokens=True)
    k = completions.tokens.shape[1]
    chats = [isinstance(text, list) for text in prompts.text for _ in range(k)] or [False] * len(texts)
    return [[{"role": "assistant", "content": t}] if chat else t for t, chat in zip(texts, chats, strict=True)]


@dataclass(frozen=True)
class GroupScores:
    """What the rewards say, by prompt and sample: fields of `lit_rlhf.types.Rollout`, and what they reported."""

    rewards: Float[Tensor, "prompts samples"]
    parts: dict[str, Float[Tensor, "prompts samples"]]
    valid: Bool[Tensor, "prompts samples"]
    whole: Bool[Tensor, "prompts samples"]
    token_rewards: Float[Tensor, "prompts samples tokens"] | None
    metrics: dict[str, float]
    extra: dict[str, list[Any]]

    def judged(self) -> Float[Tensor, "prompts samples"]:
        """The same, NaN where no reward had an opinion."""
        return self.totals().where(self.valid, torch.nan)

    def totals(self) -> Float[Tensor, "prompts samples"]:
        """Rewards of the whole completion and of its tokens."""
        return self.rewards if self.token_rewards is None else self.rewards + self.token_rewards.sum(-1)


def score(
    scorer: Scorer, prompts: Prompts, completions: Completions, texts: list[Text], state: Any = None
) -> GroupScores:
    """Let the rewards score every completion."""
    n, k, t = completions.tokens.shape
    device = completions.tokens.device
    scores = scorer(
        prompts=[text for text in prompts.text for _ in range(k)],
        completions=texts,
        completion_ids=completions.ids(),
        finished=completions.finished.flatten().tolist(),
        columns={name: [value for value in column for _ in range(k)] for name, column in prompts.columns.items()},
        state=state,
    )
    token_rewards = None
    if scores.token_rewards is not None:
        rows = torch.zeros(n * k, t, dtype=torch.float32)
        for row, numbers in zip(rows, scores.token_rewards, strict=True):
            row[: len(numbers)] = numbers
        token_rewards = rows.view(n, k, t).to(device)
    return GroupScores(
        rewards=scores.rewards.view(n, k).to(device),
        parts={name: part.view(n, k).to(device) for name, part in scores.parts.items()},
        valid=scores.valid.view(n, k).to(device),
        whole=scores.whole.view(n, k).to(device),
        token_rewards=token_rewards,
        metrics=scores.metrics,
        extra=scores.extra,
    )


class Evaluation:
    """Evaluates a policy on held-out prompts, batch by batch.

    Reward, length and win rate are of greedy completions, the KL is of sampled ones.
    """

    def __init__(self, module: Online) -> None:
        self.module = module
        self.examples: list[dict[str, Any]] = []
        self.sums: dict[str, list[float]] = {}
        self.ids: list[list[int]] = []
        weights = module.judge.weights(module.trainer.global_step)
        if weights != module.opponent_weights:  # scores by other weights do not compare
            module.opponent_scores, module.opponent_weights = {}, weights

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, prompts: Prompts) -> None:
        """Evaluate a batch of prompts."""
        module = self.module
        greedy = module.policy.sample(prompts, 1, dataclasses.replace(module.sampling, greedy=True))
        texts = completion_texts(module.tokenizer, prompts, greedy)
        scores = score(module.scorer, prompts, greedy, texts, module.trainer_state())
        sampled = module.policy.sample(prompts, 1, module.sampling, module.seed, VALIDATION_EPOCH)
        reference = module.reference.logprobs(prompts, sampled, module.sampling.temperature)
        kl = F.masked_sum(F.kl_k1(sampled.logprobs, reference), sampled.mask)[:, 0]
        totals, valid = scores.judged()[:, 0], scores.valid[:, 0]
        self.add("reward", totals[valid])
        for name, part in scores.parts.items():
            self.add(f"reward/{name}", part[~part.isnan()])
        self.add("kl", kl)
        self.add("length", greedy.lengths[:, 0])
        self.add("finished", greedy.finished[:, 0])
        self.ids.extend(greedy.ids())
        self.compare(prompts, greedy, texts, totals)
        for i in range(min(len(prompts), NUM_EXAMPLES - len(self.examples))):
            self.examples.append(
                {
                    "prompt": prompts.text[i],
                    "completion": texts[i],
                    "reward": float(totals[i]),
                    "parts": {name: float(part[i, 0]) for name, part in scores.parts.items()},
                    "kl": float(kl[i]),
                    "length": int(greedy.lengths[i, 0]),
                }
            )

    def add(self, name: str, values: Tensor) -> None:
        """Add values to the mean of a metric."""
        total = self.sums.setdefault(name, [0.0, 0.0])
        total[0] += float(values.double().sum())
        total[1] += values.numel()

    def compare(self, prompts: Prompts, greedy: Completions, texts: list[Text], totals: Tensor) -> None:
        """Let the judge compare the completions with the opponent's; a tie is half a win."""
        module = self.module
        own = totals.tolist()
        if module.judge is not module.scorer:
            own = score(module.judge, prompts, greedy, texts, module.trainer_state()).judged()[:, 0].tolist()
            self.add("judge", torch.tensor([value for value in own if value == value]))
        index = prompts.index.tolist()
        if any(i not in module.opponent_scores for i in index):
            module.opponent_scores.update(zip(index, self.opponent_scores(prompts), strict=True))
        pairs = [(mine, module.opponent_scores[i]) for mine, i in zip(own, index, strict=True)]
        wins = [float(mine > other) + 0.5 * (mine == other) for mine, other in pairs if mine == mine and other == other]
        self.add("win_rate", torch.tensor(wins))

    def opponent_scores(self, prompts: Prompts) -> list[float]:
        """The judge's scores of the opponent's completions, NaN where there is none to compare with."""
        module = self.module
        if module.opponent == "policy":
            theirs = module.reference.sample(prompts, 1, dataclasses.replace(module.sampling, greedy=True))
            texts = completion_texts(module.tokenizer, prompts, theirs)
        else:
            texts, theirs = column_completions(module.tokenizer, prompts, module.opponent)
        judged = score(module.judge, prompts, theirs, texts, module.trainer_state()).judged()[:, 0]
        return judged.where(theirs.mask[:, 0].any(-1), torch.nan).tolist()

    def metrics(self) -> dict[str, float]:
        """The means over all ranks."""
        gathered = self.module.gather({"sums": self.sums, "ids": self.ids})
        names = dict.fromkeys(name for rank in gathered for name in rank["sums"])
        totals = {n: [sum(r["sums"].get(n, (0.0, 0.0))[i] for r in gathered) for i in (0, 1)] for n in names}
        means = {name: total / count for name, (total, count) in totals.items() if count}
        return {**means, "distinct_2": distinct_n([ids for rank in gathered for ids in rank["ids"]], 2)}


def as_completion(prompt: Text, completion: Text | None) -> Text:
    """A completion as rewards see it: a message where the prompt is a conversation; empty where there is none."""
    completion = "" if completion is None else completion
    chat = isinstance(prompt, list) and isinstance(completion, str)
    return [{"role": "assistant", "content": completion}] if chat else completion


def check_opponent(opponent: str, columns: Iterable[str]) -> None:
    """Raise a ValueError if the opponent of the win rate is neither the policy nor a column of the data."""
    if opponent != "policy" and opponent not in columns:
        raise ValueError(
            f"opponent={opponent!r} is no column of the data (there are {sorted(columns)}): name one that holds "
            "completions, or `policy` for the reference policy's own"
        )


def column_completions(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, column: str
) -> tuple[list[Text], Completions]:
    """Return the completions that a column of the data holds, as if they had been sampled; without a token where none.

    Raises:
        ValueError: If there is no such column.
    """
    check_opponent(column, prompts.columns)
    given = prompts.columns[column]
    texts = [as_completion(prompt, text) for prompt, text in zip(prompts.text, given, strict=True)]
    pairs = zip(prompts.text, texts, strict=True)
    ids = [encode_completion(tokenizer, prompt, text) or [0] for prompt, text in pairs]
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    lengths = torch.tensor([0 if text is None else len(row) for text, row in zip(given, ids, strict=True)])
    mask = torch.arange(rows.shape[1]) < lengths.unsqueeze(1)
    device = prompts.tokens.device
    finished = torch.ones(len(ids), 1, dtype=torch.bool)
    completions = Completions(rows.unsqueeze(1), mask.unsqueeze(1), torch.zeros(rows.shape).unsqueeze(1), finished)
    return texts, completions.to(device)
