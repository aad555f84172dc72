"""Scoring completions: for a rollout, and of held-out prompts for validation and test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from lit_rlhf import functional as F
from lit_rlhf.evaluation.judges import SymmetricJudge
from lit_rlhf.evaluation.metrics import DistinctN, Moments, Perplexity, WinRate
from lit_rlhf.rewards import Scorer, Scores
from lit_rlhf.tokenization import decode_completions, encode_completion
from lit_rlhf.training.monitor import raise_on_all_ranks
from lit_rlhf.types import Completions, Prompts, Text

if TYPE_CHECKING:
    from lit_rlhf.algorithms.online import OnlineAlgorithm

M = TypeVar("M", bound=Metric)

VALIDATION_EPOCH = 2**31
"""The epoch in the address of validation's sampling noise: the same at every validation, and none of training's."""

NUM_EXAMPLES = 8


def completion_texts(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, completions: Completions) -> list[Text]:
    """Decode completions as rewards see them: strings, or a message each where the prompts are conversations."""
    texts = decode_completions(tokenizer, completions.ids())
    k = completions.tokens.shape[1]
    chats = [isinstance(text, list) for text in prompts.text for _ in range(k)] or [False] * len(texts)
    return [[{"role": "assistant", "content": t}] if chat else t for t, chat in zip(texts, chats, strict=True)]


def score(scorer: Scorer, prompts: Prompts, completions: Completions, texts: list[Text], state: Any = None) -> Scores:
    """Score every completion with the rewards, on the device of the completions."""
    k, t = completions.tokens.shape[1:]
    ids = completions.ids()
    scores = scorer(
        prompts=prompts.text,
        completions=[texts[i : i + k] for i in range(0, len(texts), k)],
        completion_ids=[ids[i : i + k] for i in range(0, len(ids), k)],
        finished=completions.finished.tolist(),
        columns=prompts.columns,
        state=state,
    ).to(completions.tokens.device)
    if scores.token_rewards is None:
        return scores
    padding = (0, t - scores.token_rewards.shape[2])
    return dataclasses.replace(scores, token_rewards=torch.nn.functional.pad(scores.token_rewards, padding))


@dataclass(frozen=True)
class EvaluationOptions:
    """What validation and test do beside the plain.

    Attributes:
        best_of: Above 1, what is evaluated is not the greedy completion but the one of so many samples that the rewards
            like best. To the KL of the policy is added what the choice itself costs at most (`F.best_of_kl`).
        preferred: A column of completions that people preferred; their perplexity under the policy is measured.
    """

    best_of: int = 1
    preferred: str | None = None

    def __post_init__(self) -> None:
        if self.best_of < 1:
            raise ValueError(f"best_of={self.best_of} must be at least 1")


class Evaluation:
    """Evaluates a policy on held-out prompts, batch by batch.

    Everything is of greedy completions but the KL, of sampled ones, and the perplexity, of given ones.
    """

    @torch.inference_mode(False)
    def __init__(self, module: OnlineAlgorithm) -> None:
        self.module = module
        self.drawing = dataclasses.replace(module.sampling, greedy=False)
        self.examples: list[dict[str, Any]] = []
        means = ["reward", *[f"reward/{name}" for name in module.scorer.names], "kl", "length", "finished", "undecided"]
        if isinstance(module.judge, SymmetricJudge):
            means.append("position_bias")
        elif module.judge is not module.scorer:
            means.append("judge")
        self.moments = {name: self.new(Moments()) for name in means}
        self.win_rate = self.new(WinRate())
        self.distinct = {n: self.new(DistinctN(n)) for n in (1, 2)}
        self.perplexity = None if module.evaluation.preferred is None else self.new(Perplexity())
        weights = module.judge.weights(module.updates_done)
        if weights != module.opponent_weights or module.judge.follows_training:  # other scores do not compare
            module.opponents, module.opponent_weights = {}, weights

    def new(self, metric: M) -> M:
        """A metric on the module's device."""
        return metric.to(self.module.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, prompts: Prompts) -> None:
        """Evaluate a batch of prompts; what fails on one rank fails on all."""
        with raise_on_all_ranks(self.module):
            self._update(prompts)

    def _update(self, prompts: Prompts) -> None:
        module, options = self.module, self.module.evaluation
        written = self.write(prompts)
        texts = completion_texts(module.tokenizer, prompts, written)
        scores = score(module.scorer, prompts, written, texts, module.trainer_state())
        sampled = module.policy.sample(prompts, 1, self.drawing, module.seed, VALIDATION_EPOCH)
        reference = module.reference.logprobs(prompts, sampled, module.sampling.temperature)
        kl = F.masked_sum(F.kl_k1(sampled.logprobs, reference), sampled.mask)[:, 0] + F.best_of_kl(options.best_of)
        totals, valid = scores.total()[:, 0], scores.valid[:, 0]
        self.moments["reward"].update(totals[valid])
        for name, part in scores.component_rewards.items():
            self.moments[f"reward/{name}"].update(part[~part.isnan()])
        self.moments["kl"].update(kl)
        self.moments["length"].update(written.lengths[:, 0])
        self.moments["finished"].update(written.finished[:, 0])
        for distinct in self.distinct.values():
            distinct.update(written.ids())
        if self.perplexity is not None and options.preferred is not None:
            given = column_completions(module.tokenizer, prompts, options.preferred)[1]
            check_lengths(module.policy.causal_lm.config, prompts, given, options.preferred)
            self.perplexity.update(module.policy.logprobs(prompts, given), given.mask)
        self.compare(prompts, written, texts, totals)
        for i in range(min(len(prompts), NUM_EXAMPLES - len(self.examples))):
            self.examples.append(
                {
                    "prompt": prompts.text[i],
                    "completion": texts[i],
                    "reward": float(totals[i]),
                    "parts": {name: float(part[i, 0]) for name, part in scores.component_rewards.items()},
                    "kl": float(kl[i]),
                    "length": int(written.lengths[i, 0]),
                }
            )

    def write(self, prompts: Prompts) -> Completions:
        """The completions to evaluate, one a prompt."""
        module, n = self.module, self.module.evaluation.best_of
        if n == 1:
            return module.policy.sample(prompts, 1, dataclasses.replace(module.sampling, greedy=True))
        sampled = module.policy.sample(prompts, n, self.drawing, module.seed, VALIDATION_EPOCH)
        texts = completion_texts(module.tokenizer, prompts, sampled)
        scores = score(module.scorer, prompts, sampled, texts, module.trainer_state()).total()
        best = scores.nan_to_num(-torch.inf).argmax(1)
        return sampled.map(lambda tensor: tensor[torch.arange(len(best), device=best.device), best].unsqueeze(1))

    def compare(self, prompts: Prompts, written: Completions, texts: list[Text], totals: Tensor) -> None:
        """Let the judge compare the completions with the opponent's; a tie is half a win."""
        module = self.module
        if isinstance(module.judge, SymmetricJudge):
            wins = self.compare_pairs(module.judge, prompts, texts)
        else:
            own = totals
            if module.judge is not module.scorer:
                own = score(module.judge, prompts, written, texts, module.trainer_state()).total()[:, 0]
                self.moments["judge"].update(own[~own.isnan()])
            opponents = self.of_opponent(prompts, self.scored_opponent)
            theirs = torch.tensor([number for _, number in opponents], dtype=own.dtype, device=own.device)
            # a model's scores of one text can round apart, by what else is in the batch
            same = [text == other for text, (other, _) in zip(texts, opponents, strict=True)]
            tie = (own == theirs) | torch.tensor(same, device=own.device)
            wins = torch.where(tie, 0.5, (own > theirs).float()).where(~(own.isnan() | theirs.isnan()), torch.nan)
        decided = ~wins.isnan()
        self.win_rate.update(wins[decided])
        self.moments["undecided"].update(~decided)

    def compare_pairs(self, judge: SymmetricJudge, prompts: Prompts, texts: list[Text]) -> Float[Tensor, " prompts"]:
        """How much of a win each completion has over the opponent's; NaN where nothing was decided."""
        opponents = self.of_opponent(prompts, self.opponent_texts)
        there = [i for i, text in enumerate(opponents) if text is not None]
        wins, bias = torch.full((len(texts),), torch.nan, dtype=torch.float32), torch.zeros(0)
        if there:
            columns = {name: [column[i] for i in there] for name, column in prompts.columns.items()}
            own = ([prompts.text[i] for i in there], [texts[i] for i in there], [opponents[i] for i in there])
            wins[there], bias = judge(*own, columns, self.module.trainer_state())
        self.moments["position_bias"].update(bias[~bias.isnan()])
        return wins

    def of_opponent(self, prompts: Prompts, make: Callable[[Prompts], list[Any]]) -> list[Any]:
        """What `make` says of the opponent's completions, found out once."""
        kept, index = self.module.opponents, prompts.index.tolist()
        if any(i not in kept for i in index):
            kept.update(zip(index, make(prompts), strict=True))
        return [kept[i] for i in index]

    def scored_opponent(self, prompts: Prompts) -> list[tuple[Text, float]]:
        """The opponent's completions and the judge's scores of them, NaN where there is none to compare with."""
        module = self.module
        assert isinstance(module.judge, Scorer)
        texts, theirs = self.opponent(prompts)
        judged = score(module.judge, prompts, theirs, texts, module.trainer_state()).total()[:, 0]
        return list(zip(texts, judged.where(theirs.mask[:, 0].any(-1), torch.nan).tolist(), strict=True))

    def opponent_texts(self, prompts: Prompts) -> list[Text | None]:
        """The opponent's completions, None where there is none."""
        texts, theirs = self.opponent(prompts)
        return [text if there else None for text, there in zip(texts, theirs.mask[:, 0].any(-1).tolist(), strict=True)]

    def opponent(self, prompts: Prompts) -> tuple[list[Text], Completions]:
        """What the opponent wrote."""
        module = self.module
        if module.opponent != "policy":
            return column_completions(module.tokenizer, prompts, module.opponent)
        theirs = module.reference.sample(prompts, 1, dataclasses.replace(module.sampling, greedy=True))
        return completion_texts(module.tokenizer, prompts, theirs), theirs

    def metrics(self) -> dict[str, float]:
        """All there is to say, over all ranks; what nothing counts for is left out."""
        moments = {name: moments.compute() for name, moments in self.moments.items()}
        rate, low, high = self.win_rate.compute()
        measured = {
            **{name: mean for name, (mean, _) in moments.items()},
            "return": moments["reward"][0] - self.module.kl_coef * moments["kl"][0],
            "reward_variance": moments["reward"][1],
            "win_rate": rate,
            "win_rate_low": low,
            "win_rate_high": high,
            **{f"distinct_{n}": distinct.compute() for n, distinct in self.distinct.items()},
        }
        if self.perplexity is not None:
            measured["perplexity"] = self.perplexity.compute()
        return {name: float(value) for name, value in measured.items() if not value.isnan()}


def predict(module: OnlineAlgorithm, prompts: Prompts) -> list[dict[str, Any]]:
    """Sample completions of each prompt, one where greedy, and return them with their scores, one record each."""
    k = 1 if module.sampling.greedy else module.num_samples
    completions = module.policy.sample(prompts, k, module.sampling, module.seed)
    texts = completion_texts(module.tokenizer, prompts, completions)
    scores = score(module.scorer, prompts, completions, texts, module.trainer_state())
    rewards, parts = scores.total().tolist(), {name: part.tolist() for name, part in scores.component_rewards.items()}
    return [
        {
            "index": int(prompts.index[i]),
            "sample": j,
            "prompt": prompts.text[i],
            "completion": texts[i * k + j],
            "reward": rewards[i][j],
            "parts": {name: part[i][j] for name, part in parts.items()},
            "finished": bool(completions.finished[i, j]),
        }
        for i in range(len(prompts))
        for j in range(k)
    ]


def as_completion(prompt: Text, completion: Text | None) -> Text:
    """A completion as rewards see it: a message where the prompt is a conversation; empty where there is none."""
    completion = "" if completion is None else completion
    chat = isinstance(prompt, list) and isinstance(completion, str)
    return [{"role": "assistant", "content": completion}] if chat else completion


def check_opponent(opponent: str, columns: Iterable[str]) -> None:
    """Raise a ValueError if the opponent of the win rate is neither the policy nor a column of the data."""
    if opponent != "policy":
        check_completions("opponent", opponent, columns, ", or `policy` for the reference policy's own")


def check_completions(option: str, column: str, columns: Iterable[str], otherwise: str = "") -> None:
    """Raise a ValueError if there is no such column of completions."""
    if column not in columns:
        raise ValueError(
            f"{option}={column!r} is no column of the data (there are {sorted(columns)}): name one that holds "
            f"completions{otherwise}"
        )


def check_lengths(config: Any, prompts: Prompts, given: Completions, column: str) -> None:
    """Raise a ValueError if a prompt with its completion from a column is longer than the policy has positions."""
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = prompts.mask.sum(1) + given.lengths[:, 0]
    if known is not None and int(lengths.max()) > known:
        worst = int(lengths.argmax())
        raise ValueError(
            f"row {int(prompts.index[worst])} and its {column!r} have {int(lengths[worst])} tokens, more than the "
            f"{known} positions of the policy: leave out such rows with data.transform"
        )


def column_completions(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, column: str
) -> tuple[list[Text], Completions]:
    """Return the completions that a column of the data holds, as if they had been sampled; without a token where none.

    Raises:
        ValueError: If there is no such column.
    """
    check_completions("column", column, prompts.columns)
    given = prompts.columns[column]
    texts = [as_completion(prompt, text) for prompt, text in zip(prompts.text, given, strict=True)]
    template_kwargs = prompts.template_kwargs or [{}] * len(texts)
    ids = [
        encode_completion(tokenizer, prompt, text, template_kwargs=options) or [0]
        for prompt, text, options in zip(prompts.text, texts, template_kwargs, strict=True)
    ]
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    lengths = torch.tensor([0 if text is None else len(row) for text, row in zip(given, ids, strict=True)])
    mask = torch.arange(rows.shape[1]) < lengths.unsqueeze(1)
    device = prompts.tokens.device
    finished = torch.ones(len(ids), 1, dtype=torch.bool)
    completions = Completions(rows.unsqueeze(1), mask.unsqueeze(1), torch.zeros(rows.shape).unsqueeze(1), finished)
    return texts, completions.to(device)
