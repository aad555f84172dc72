"""Rows of each training step: the same for any number of ranks and after a resume."""

import itertools

import lightning
import pytest
import torch

from lit_rlhf.data import BlockSampler, EvalSampler, ResumableLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # from Lightning with a newer torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def blocks(sampler, epoch=0, seed=0, start=0):
    sampler.set_epoch(epoch)
    sampler.seed, sampler.start = seed, start
    return list(sampler)


@pytest.mark.parametrize("size", [8, 17, 40])
@pytest.mark.parametrize("repeats", [1, 3])
def test_two_ranks_see_the_rows_of_one_process_with_twice_the_batch_size(size, repeats):
    rows = range(size)
    one = blocks(BlockSampler(rows, 4, repeats=repeats), epoch=2, seed=5)
    two = [blocks(BlockSampler(rows, 2, num_replicas=2, rank=rank, repeats=repeats), 2, 5) for rank in (0, 1)]
    assert one == [left + right for left, right in zip(*two, strict=True)]


def test_each_block_is_repeated_and_each_row_is_in_one_block_per_epoch():
    steps = blocks(BlockSampler(range(12), 4, repeats=3))
    groups = [list(group) for _, group in itertools.groupby(steps)]
    assert [len(group) for group in groups] == [3, 3, 3]
    assert sorted(row for group in groups for row in group[0]) == list(range(12))


@pytest.mark.parametrize(
    ("size", "repeats", "accumulate", "steps"),
    [
        (12, 1, 1, 3),
        (15, 1, 1, 3),
        (12, 2, 1, 6),
        (12, 4, 2, 12),
        (12, 1, 2, 2),
        (12, 2, 4, 4),
        (20, 2, 4, 8),
        (3, 1, 1, 0),
    ],
)
def test_length_counts_repeats_and_is_cut_to_whole_windows(size, repeats, accumulate, steps):
    sampler = BlockSampler(range(size), 4, repeats=repeats, accumulate=accumulate)
    assert len(sampler) == len(blocks(sampler)) == steps
    assert (steps > 0) == (size >= sampler.min_rows)


def test_order_depends_on_seed_and_epoch():
    orders = {(seed, epoch): blocks(BlockSampler(range(64), 8), epoch, seed) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(map(str, orders.values()))) == 4
    assert blocks(BlockSampler(range(64), 8), 1, 1) == orders[1, 1]


@pytest.mark.parametrize("start", range(7))
def test_start_skips_steps_but_not_the_length(start):
    sampler = BlockSampler(range(13), 4, repeats=2)
    assert blocks(sampler, 3, start=start) == blocks(sampler, 3)[start:]
    assert len(sampler) == 6


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 31])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_eval_sampler_yields_each_row_once_in_order_with_equal_counts_per_rank(size, batch_size, ranks):
    if size < ranks:
        return
    shares = [list(EvalSampler(range(size), batch_size, ranks, rank)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    seen = [row for step in zip(*shares, strict=True) for block in step for row in block]
    assert seen == list(range(size))
    assert max(len(block) for share in shares for block in share) <= max(batch_size, 2)


class Blocks(list):
    """Data set that is indexed with lists."""

    def __getitem__(self, index):
        return [list.__getitem__(self, i) for i in index]


class Recorder(lightning.LightningModule):
    """Records the rows of each step; corrects the loop progress at the end of an epoch as `Algorithm` does."""

    def __init__(self, folder, seed):
        super().__init__()
        self.seed = seed
        self.folder = folder
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch))
        return self.weight * 1.0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.folder and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.trainer.save_checkpoint(self.folder / f"step={self.global_step}.ckpt")

    def on_load_checkpoint(self, checkpoint):
        loop = checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_progress"]
        if progress["current"]["processed"] == progress["current"]["ready"]:
            loop["epoch_loop.batch_progress"]["is_last_batch"] = False
            for count in loop["epoch_loop.batch_progress"]["current"]:
                loop["epoch_loop.batch_progress"]["current"][count] = 0
            for part in ("current", "total"):
                progress[part]["completed"] = progress[part]["processed"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, rows, workers=0, resume=None, seed=7, **flags):
    """Train to update 11. An uninterrupted run saves each update; otherwise resume after update `resume`."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=11,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **flags,
    )
    module = Recorder(None if resume else folder, seed)
    sampler = BlockSampler(rows, 3, repeats=2, accumulate=trainer.accumulate_grad_batches)
    loader = ResumableLoader(Blocks(rows), sampler, trainer, collate_fn=list, num_workers=workers)
    trainer.fit(module, loader, ckpt_path=folder / f"step={resume}.ckpt" if resume else None)
    return module.seen


@pytest.mark.parametrize(
    ("workers", "flags"), [(0, {}), (0, {"accumulate_grad_batches": 2}), (0, {"limit_train_batches": 4}), (2, {})]
)
def test_a_resumed_run_sees_the_rows_of_an_uninterrupted_run(tmp_path, workers, flags):
    rows = list(range(100, 110))  # three blocks, so six steps per epoch, and one row left over
    steps = flags.get("accumulate_grad_batches", 1)
    uninterrupted = fit(tmp_path, rows, workers, **flags)
    assert len(uninterrupted) == 11 * steps
    assert len({str(seen) for seen in uninterrupted}) == len(uninterrupted)
    for stop in (3, 6, 7, 10) if workers else range(1, 11):
        assert fit(tmp_path, rows, workers, stop, **flags) == uninterrupted[stop * steps :], (
            f"resumed after update {stop}"
        )


def test_order_depends_on_the_seed_of_the_module(tmp_path):
    rows = list(range(40))
    assert fit(tmp_path, rows) == fit(tmp_path, rows) != fit(tmp_path, rows, seed=8)


def test_a_loader_without_a_trainer_starts_at_step_0():
    loader = ResumableLoader(Blocks(list("abcdef")), BlockSampler(range(6), 2), collate_fn=list)
    assert sorted(letter for batch in loader for letter in batch) == list("abcdef")
    assert list(loader) == list(loader)
