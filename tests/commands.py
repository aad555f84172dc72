"""A workspace with a tiny model and data of every kind, and a command line that trains in it."""

import json
from pathlib import Path

from lit_rlhf.cli import main
from tiny import make_llama, make_tokenizer

MODULE = """
import lit_rlhf

class ByLength(lit_rlhf.RLOO):
    def advantages(self, rollout):
        lengths = rollout.completions.lengths * rollout.valid
        total = lengths.sum(1, keepdim=True).clamp(min=1)
        return rollout.returns - (rollout.returns * lengths).sum(1, keepdim=True) / total

class NoLoss(lit_rlhf.RankingAlgorithm):
    def advantages(self, rollout):
        return rollout.ranking

class Faulty(lit_rlhf.RLOO):
    def advantages(self, rollout):
        prompts, samples = rollout.completions.tokens.shape  # has a third dimension
        return rollout.rewards.reshape(prompts, samples)

def words(completions, **kwargs):
    return [float(len(text.split())) for text in completions]
"""

FAST = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
SHORT = ["--model.sampling.max_new_tokens=4", "--data.batch_size=4"]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_workspace(folder: Path) -> None:
    """Write a tiny model, prompts, demonstrations, preferences, questions, reviews, and a user's module `mine`."""
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    texts = [f"the {word} number {i} was long" for i in range(8) for word in ("film", "book", "play", "song")]
    write_rows(folder / "prompts.jsonl", [{"prompt": text, "answer": text[4:8]} for text in texts])
    write_rows(folder / "demonstrations.jsonl", [{"prompt": text, "completion": " and good"} for text in texts])
    pairs = [{"prompt": text, "chosen": f" good {i}", "rejected": f" bad {-i}"} for i, text in enumerate(texts)]
    write_rows(folder / "preferences.jsonl", pairs)
    write_rows(folder / "questions.jsonl", [{"question": text, "answer": f"so #### {len(text)}"} for text in texts])
    write_rows(folder / "reviews.jsonl", [{"text": f"{text} and rather nice to see"} for text in texts])
    (folder / "mine.py").write_text(MODULE)


def fit(*args: str) -> None:
    """Train RLOO in the workspace."""
    common = ["--model.policy=tiny", "--data.train=prompts.jsonl", "--data.val=4", "--trainer.default_root_dir=here"]
    main(["fit", "--config=rloo", *common, "--model.rewards+=mine.words", *SHORT, *FAST, *args])
