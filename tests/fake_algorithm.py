"""Fake algorithms for tests of callbacks: public attributes of the real ones, two weights, synthetic rollouts."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from lit_rlhf.types import Completions, Prompts, Rollout

N, K, T = 3, 2, 4


class ByteTokenizer:
    """Tokenizer whose ids are the bytes of the text; 0 is EOS."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": self.encode(text)}

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids, skip_special_tokens=False):
        return bytes(i for i in ids if i).decode(errors="replace")

    def batch_decode(self, rows, skip_special_tokens=False):
        return [self.decode(row) for row in rows]


class Numbers(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor(float(index))


class FakeResumableLoader(DataLoader):
    """Loader that starts at the Trainer's progress, like the loaders of the data modules."""

    trainer: Trainer

    def __iter__(self):
        start = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        yield from list(super().__iter__())[start:]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class FakeAlgorithm(LightningModule):
    """Algorithm without rollouts, like SFT."""

    steps_per_rollout = 1

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.ones(2))
        self.exports: list[str] = []
        self.tokenizer = ByteTokenizer()
        self.scores = [0.1, 0.3, 0.2, 0.4, 0.1]

    def training_step(self, batch, batch_idx):
        self.log("train/loss", self.weights.sum(), prog_bar=True)
        return ((self.weights - batch.mean()) ** 2).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/reward", self.scores[min(len(self.scores) - 1, self.global_step // 4)])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def train_dataloader(self):
        loader = FakeResumableLoader(Numbers())
        loader.trainer = self.trainer
        return loader

    def val_dataloader(self):
        return DataLoader(Numbers(), batch_size=12)

    def export(self, folder: Path):
        self.exports.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.weights.detach(), folder / "weights.pt")


class FakeOnlineAlgorithm(FakeAlgorithm):
    """Online algorithm with two training steps per rollout; completion i = 1, 2, ... has a KL of `kl * i`."""

    steps_per_rollout = 2
    num_samples = K
    kl_coef = 0.05
    kl = 1.0

    def __init__(self):
        super().__init__()
        self.rollout: Rollout | None = None
        self.examples: list[dict] = []

    def training_step(self, batch, batch_idx):
        if batch_idx % self.steps_per_rollout == 0:
            self.rollout = make_rollout(self.tokenizer, self.kl)
            for name, value in {"reward": 0.5 + self.global_step / 40, "kl": 1.5 * self.kl, "entropy": 2.0}.items():
                self.log(f"train/{name}", value, prog_bar=name != "entropy")
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        step = self.global_step
        self.log_dict({"val/kl": step / 10, "val/win_rate": 0.5 + step / 100, "val/reward/style": float(step)})
        row = {"reward": 0.5, "component_rewards": {"style": float(step)}, "kl": float("inf"), "length": 3}
        self.examples = [{"prompt": f"prompt {i}", "completion": f"answer {step}", **row} for i in range(5)]


def make_rollout(tokenizer, kl=1.0) -> Rollout:
    texts = [["ab", "abc"], ["b[/]", "é"], ["x", ""]]
    ids = [[[*tokenizer.encode(text)[: T - 1], tokenizer.eos_token_id] for text in row] for row in texts]
    tokens = torch.tensor([[row + [0] * (T - len(row)) for row in group] for group in ids])
    mask = torch.tensor([[[True] * len(row) + [False] * (T - len(row)) for row in group] for group in ids])
    logprobs = torch.full((N, K, T), -1.0).masked_fill(~mask, 0.0)
    number = 1.0 + torch.arange(N * K).reshape(N, K)
    reference = (logprobs - (kl * number / mask.sum(-1)).unsqueeze(-1)).masked_fill(~mask, float("nan"))
    return Rollout(
        prompts=Prompts(torch.ones(N, 2, dtype=torch.long), torch.ones(N, 2, dtype=torch.bool), torch.arange(N),
                        text=["say [bold]", [{"role": "user", "content": "hi"}], "third"]),
        completions=Completions(tokens, mask, logprobs, finished=torch.ones(N, K, dtype=torch.bool)),
        reference_logprobs=reference,
        rewards=number / 10,
        component_rewards={"style": number, "length": torch.full((N, K), float("nan"))},
        valid=torch.tensor([[True, True], [True, True], [True, False]]),
        returns=number / 10,
        texts=[[ByteTokenizer().decode(tokens[i, j][mask[i, j]].tolist()) for j in range(K)] for i in range(N)],
    )  # fmt: skip
