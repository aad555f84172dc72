"""The same on real people's judgement: `python -m lit_rlhf.testbed.ratings --data RATED.jsonl --out FOLDER`.

From a file of texts, each rated by several people, to what a comparison of methods needs: a small policy that writes
such texts, a reward model of one half of the ratings, a judge of the other half, prompts and preferences. The last
texts of the file are held out of all of it. It was made for the 10,605 sentences of movie reviews, with 15 to 29
ratings each, of Hutto and Gilbert, *VADER*, ICWSM 2014.
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
from lit_rlhf.rewards import RewardModel
from lit_rlhf.testbed.build import fit, new_policy, options, train_reward_model
from lit_rlhf.testbed.tokenizer import SPECIALS

PROMPT_WORDS = 3


@dataclass(frozen=True)
class Rated:
    """A text and what each of several people gave it."""

    text: str
    ratings: tuple[float, ...]


def read_rated(path: str | Path) -> list[Rated]:
    """Read rated texts.

    Raises:
        ValueError: If a row has no `text`, or no two `ratings`.
    """
    rated = []
    for i, row in enumerate(load_rows(str(path))):
        text, ratings = row.get("text"), row.get("ratings")
        numbers = [rating for rating in ratings or [] if isinstance(rating, int | float)]
        if not isinstance(text, str) or len(numbers) < 2 or len(numbers) != len(ratings or []):
            raise ValueError(
                f"row {i} of {str(path)!r} needs a string `text` and a list `ratings` of two numbers at least, and has "
                f"text={text!r}, ratings={ratings!r}"
            )
        rated.append(Rated(text.strip(), tuple(map(float, numbers))))
    if len({rating for one in rated for rating in one.ratings}) < 2:
        raise ValueError(f"all ratings in {str(path)!r} are equal: there is nothing to prefer")
    return rated


def split(rated: Sequence[Rated], held_out: int) -> tuple[list[Rated], list[Rated], list[Rated]]:
    """Return the texts of the reward model, those of the judge, and the last ones of the file, held out of both.

    Raises:
        ValueError: If too few are left.
    """
    test = list({one.text: one for one in rated[-held_out:]}.values())
    unseen = {one.text for one in test}
    rest = [one for one in rated[:-held_out] if one.text not in unseen]
    if len(rest) < 4 or len(test) < 2:
        raise ValueError(f"{len(rated)} rated texts are too few to hold {held_out} of them out")
    return rest[::2], rest[1::2], test


def preference(first: Rated, second: Rated) -> float:
    """How likely a rater of the first text put it above what a rater of the second gave that; a tie is half."""
    pairs = [(a > b) + 0.5 * (a == b) for a in first.ratings for b in second.ratings]
    return statistics.fmean(pairs)


def asked_pairs(rated: Sequence[Rated], n: int, seed: int) -> list[dict[str, str]]:
    """Draw pairs of texts and a rater of each: the text with the higher rating is the chosen one; no ties.

    Raises:
        ValueError: If there are only ties.
    """
    if len({rating for one in rated for rating in one.ratings}) < 2:
        raise ValueError(f"all ratings of these {len(rated)} texts are equal: there is nothing to prefer among them")
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
    """Return how often a model, and how often a single rater of each text, agree with the majority on pairs of texts.

    Pairs on which the raters are evenly split are left out, and ties of two raters count half.

    Raises:
        ValueError: If the raters are split on every pair.
    """
    rng = Random(f"agreement {seed}")
    scores = model([""] * len(rated), [one.text for one in rated]).tolist()
    right, raters = [], []
    for _ in range(n):
        i, j = rng.sample(range(len(rated)), 2)
        likely = preference(rated[i], rated[j])
        if likely != 0.5:
            margin = scores[i] - scores[j]
            right.append(float((margin > 0) == (likely > 0.5)) if margin else 0.5)
            raters.append(max(likely, 1 - likely))
    if not right:
        raise ValueError(f"on no pair of these {len(rated)} texts do the raters lean to one side: hold out more")
    return statistics.fmean(right), statistics.fmean(raters)


def make_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer; every text begins with `<bos>`."""
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
    """Make prompts of the first words; `preferred` is how the better rated half of the texts goes on, else None."""
    cut = FirstWords("text", PROMPT_WORDS)
    means = [statistics.fmean(one.ratings) for one in rated]
    middle = statistics.median(means)
    rows = [(cut({"text": one.text}), mean > middle) for one, mean in zip(rated, means, strict=True)]
    return [{"prompt": row["prompt"], "preferred": row["reference"] if liked else None} for row, liked in rows if row]


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
    """Write models and data, and print what the reward model and the judge are worth.

    Args:
        data: The rated texts: JSON lines with `text` and `ratings`.
        out: The folder: `policy`, `reward_model`, `judge`, and the JSON lines `train`, `test` and `pairs`.
        seed: Of everything.
        held_out: Texts at the end of the file that nothing is trained on; shuffle the file before.
        num_pairs: Pairs that the reward model learns from, and as many others for the judge.
        epochs: Of SFT over all other texts.
        vocabulary: Tokens.
        hidden: Width of the policy.
        layers: Layers of the policy.
    """
    for_reward, for_judge, test = split(read_rated(data), held_out)
    texts = [one.text for one in (*for_reward, *for_judge)]
    out.mkdir(parents=True, exist_ok=True)
    pairs = {"reward_model": asked_pairs(for_reward, num_pairs, seed), "judge": asked_pairs(for_judge, num_pairs, seed)}
    unseen = prompt_rows(test)
    taken = {row["prompt"] for row in unseen}
    write_rows(out / "test.jsonl", unseen)
    rows = prompt_rows([*for_reward, *for_judge])
    write_rows(out / "train.jsonl", [row for row in rows if row["prompt"] not in taken])
    write_rows(out / "pairs.jsonl", pairs["reward_model"])

    seed_everything(seed)
    sft = SFT(new_policy(make_tokenizer(texts, vocabulary), hidden, layers), **options(2e-3))
    demonstrations = DemonstrationData(
        [{"text": text} for text in texts], val=[{"text": one.text} for one in test], batch_size=32
    )
    fit(sft, demonstrations, epochs)
    loss = float(sft.trainer.callback_metrics["val/loss"])
    sft.policy.save(out / "policy")
    print(f"the policy: {math.exp(loss):.1f} perplexity a token on {len(test)} texts held out")
    for name, asked in pairs.items():
        train_reward_model(out / "policy", asked, out / name, seed)
        model, rater = agreement(RewardModel(out / name, batch_size=256), test)
        print(f"{out / name}: with the majority of raters in {model:.1%} of held-out pairs (one rater: {rater:.1%})")


if __name__ == "__main__":
    jsonargparse.auto_cli(build, as_positional=False, prog="python -m lit_rlhf.testbed.ratings")
