"""The testbed on real human ratings: `python -m lit_rlhf.testbed.ratings --data RATED.jsonl --out FOLDER`.

Converts a file of texts, each rated by several people, into everything that a comparison of methods needs: a small
policy that writes such texts, a reward model trained on one half of the ratings, a judge trained on the other half,
prompts and preferences. The last texts of the file are held out from all training. Written for the 10,605 sentences of
movie reviews, with 15 to 29 ratings each, of Hutto and Gilbert, *VADER*, ICWSM 2014.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import jsonargparse
from lightning.pytorch import seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lit_rlhf.algorithms import SFT
from lit_rlhf.data import DemonstrationData, FirstWords, load_rows
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import RewardModel
from lit_rlhf.testbed.build import make_trainer, new_policy, optimizer_options, train_reward_model
from lit_rlhf.testbed.tokenizer import SPECIALS

PROMPT_WORDS = 3


@dataclass(frozen=True)
class Rated:
    """A text and its ratings by several people."""

    text: str
    ratings: tuple[float, ...]


def read_rated(path: str | Path) -> list[Rated]:
    """Read rated texts.

    Raises:
        ValueError: If a row lacks a `text` or two numeric `ratings`, or if all ratings are equal.
    """
    rated = []
    for i, row in enumerate(load_rows(str(path))):
        text, ratings = row.get("text"), row.get("ratings")
        numbers = [rating for rating in ratings or [] if isinstance(rating, int | float)]
        if not isinstance(text, str) or len(numbers) < 2 or len(numbers) != len(ratings or []):
            raise InputError(
                f"row {i} of {str(path)!r} needs a string `text` and a list `ratings` of at least two numbers, not "
                f"text={text!r}, ratings={ratings!r}"
            )
        rated.append(Rated(text.strip(), tuple(map(float, numbers))))
    if len({rating for item in rated for rating in item.ratings}) < 2:
        raise InputError(f"all ratings in {str(path)!r} are equal: there is no preference to learn")
    return rated


def split(rated: Sequence[Rated], held_out: int) -> tuple[list[Rated], list[Rated], list[Rated]]:
    """Split texts for the reward model, for the judge, and the last ones of the file, held out from both.

    Raises:
        ValueError: If fewer than four texts are left for training, or fewer than two are held out.
    """
    test = list({item.text: item for item in rated[-held_out:]}.values())
    test_texts = {item.text for item in test}
    rest = [item for item in rated[:-held_out] if item.text not in test_texts]
    if len(rest) < 4 or len(test) < 2:
        raise InputError(f"{len(rated)} rated texts are too few to hold out {held_out} of them")
    return rest[::2], rest[1::2], test


def preference(first: Rated, second: Rated) -> float:
    """Probability that a random rater of `first` rates it higher than a random rater of `second`; a tie counts half."""
    pairs = [(a > b) + 0.5 * (a == b) for a in first.ratings for b in second.ratings]
    return statistics.fmean(pairs)


def rated_pairs(rated: Sequence[Rated], n: int, seed: int) -> list[dict[str, str]]:
    """Sample pairs of texts with one rater of each; the higher rating is chosen, and ties are sampled again.

    Raises:
        ValueError: If all ratings are equal.
    """
    if len({rating for item in rated for rating in item.ratings}) < 2:
        raise InputError(f"all ratings of these {len(rated)} texts are equal: there is no preference to learn")
    rng = Random(f"asked {seed}")
    rows: list[dict[str, str]] = []
    while len(rows) < n:
        first, second = rng.sample(range(len(rated)), 2)
        a, b = rng.choice(rated[first].ratings), rng.choice(rated[second].ratings)
        if a != b:
            chosen, rejected = (first, second) if a > b else (second, first)
            rows.append({"prompt": "", "chosen": rated[chosen].text, "rejected": rated[rejected].text})
    return rows


def agreement(
    model: Callable[..., Tensor], rated: Sequence[Rated], n: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Return the pairwise accuracy of a model, and of single raters, against the majority of raters.

    Pairs on which the raters are evenly split are skipped; ties of two raters count half.

    Raises:
        ValueError: If the raters are evenly split on every pair.
    """
    rng = Random(f"agreement {seed}")
    scores = model([""] * len(rated), [item.text for item in rated]).tolist()
    correct, raters = [], []
    for _ in range(n):
        i, j = rng.sample(range(len(rated)), 2)
        probability = preference(rated[i], rated[j])
        if probability != 0.5:
            margin = scores[i] - scores[j]
            correct.append(float((margin > 0) == (probability > 0.5)) if margin else 0.5)
            raters.append(max(probability, 1 - probability))
    if not correct:
        raise InputError(f"the raters are evenly split on every pair of these {len(rated)} texts: hold out more texts")
    return statistics.fmean(correct), statistics.fmean(raters)


def make_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; every text starts with `<bos>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def prompt_rows(rated: Sequence[Rated]) -> list[dict[str, Any]]:
    """Make prompts of the first words; `preferred` is the rest of the text for the better-rated half, else None."""
    cut = FirstWords("text", PROMPT_WORDS)
    means = [statistics.fmean(item.ratings) for item in rated]
    median = statistics.median(means)
    rows = [(cut({"text": item.text}), mean > median) for item, mean in zip(rated, means, strict=True)]
    return [{"prompt": row["prompt"], "preferred": row["reference"] if better else None} for row, better in rows if row]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build(
    data: str | Path,
    out: Path = Path("runs/ratings"),
    seed: int = 0,
    held_out: int = 1000,
    num_pairs: int = 24_000,
    epochs: int = 10,
    vocabulary: int = 3000,
    hidden: int = 192,
    layers: int = 4,
) -> None:
    """Write models and data, and print the accuracy of the reward model and of the judge on held-out pairs.

    Args:
        data: Rated texts: JSON lines with `text` and `ratings`.
        out: Output folder: `policy`, `reward_model`, `judge`, and the JSON lines `train`, `test` and `pairs`.
        seed: Seed of the whole pipeline.
        held_out: Number of texts at the end of the file held out from all training; shuffle the file first.
        num_pairs: Number of pairs for the reward model, and as many others for the judge.
        epochs: Epochs of SFT over all other texts.
        vocabulary: Vocabulary size.
        hidden: Hidden size of the policy.
        layers: Number of layers of the policy.
    """
    for_reward, for_judge, test = split(read_rated(data), held_out)
    texts = [item.text for item in (*for_reward, *for_judge)]
    out.mkdir(parents=True, exist_ok=True)
    pairs = {"reward_model": rated_pairs(for_reward, num_pairs, seed), "judge": rated_pairs(for_judge, num_pairs, seed)}
    test_rows = prompt_rows(test)
    test_prompts = {row["prompt"] for row in test_rows}
    write_rows(out / "test.jsonl", test_rows)
    rows = prompt_rows([*for_reward, *for_judge])
    write_rows(out / "train.jsonl", [row for row in rows if row["prompt"] not in test_prompts])
    write_rows(out / "pairs.jsonl", pairs["reward_model"])

    seed_everything(seed)
    sft = SFT(new_policy(make_tokenizer(texts, vocabulary), hidden, layers), **optimizer_options(2e-3))
    demonstrations = DemonstrationData(
        [{"text": text} for text in texts], val=[{"text": item.text} for item in test], batch_size=32
    )
    make_trainer(epochs).fit(sft, datamodule=demonstrations)
    loss = float(sft.trainer.callback_metrics["val/loss"])
    sft.policy.save(out / "policy")
    print(f"policy: perplexity {math.exp(loss):.1f} per token on {len(test)} held-out texts")
    for name, training_pairs in pairs.items():
        train_reward_model(out / "policy", training_pairs, out / name, seed)
        model, rater = agreement(RewardModel(out / name, batch_size=256), test)
        print(f"{out / name}: agrees with most raters on {model:.1%} of held-out pairs (single raters: {rater:.1%})")


if __name__ == "__main__":
    jsonargparse.auto_cli(build, as_positional=False, prog="python -m lit_rlhf.testbed.ratings")
