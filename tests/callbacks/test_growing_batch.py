"""Gradient noise and growing batches, in runs with a real Trainer."""

import itertools
import math
import sys

import pytest
import torch
from lightning.pytorch import Callback

import lit_rlhf
from lit_rlhf import functional as F
from lit_rlhf.callbacks import AdaptiveBatch, BatchSchedule, GradientNoise
from lit_rlhf.data import BlockSampler
from runs import make_data, make_module, make_trainer

# The sampler


def blocks(sampler, start=0):
    sampler.start = start
    return list(sampler)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(
    "sizes", [[(0, 2), (2, 3)], [(0, 1), (1, 2), (2, 4)], [(0, 5), (9, 6)], [(0, 2), (3, 9)]], ids=str
)
def test_growing_blocks_yield_each_row_at_most_once(sizes, repeats):
    sampler = BlockSampler(range(17), 2, repeats=repeats)
    sampler.sizes = sizes
    steps = blocks(sampler)
    assert len(steps) == len(sampler) and len(sampler) % repeats == 0
    rollouts = steps[::repeats]
    assert [len(block) for block in rollouts] == [
        next(s for b, s in sizes[::-1] if b <= i) for i in range(len(rollouts))
    ]
    rows = [row for block in rollouts for row in block]
    assert len(set(rows)) == len(rows)
    left = 17 - len(rows)
    assert left < next(size for first, size in sizes[::-1] if first <= len(rollouts))
    assert all(blocks(sampler, start) == steps[start:] for start in range(len(steps)))


def test_growing_blocks_of_two_ranks_equal_those_of_one_process():
    one = BlockSampler(range(40), 4)
    one.sizes = [(0, 4), (2, 8), (3, 10)]
    two = [BlockSampler(range(40), 2, num_replicas=2, rank=rank) for rank in (0, 1)]
    for sampler in two:
        sampler.sizes = [(first, size // 2) for first, size in one.sizes]
    assert blocks(one) == [left + right for left, right in zip(*map(blocks, two), strict=True)]


def test_growth_keeps_the_blocks_already_yielded():
    sampler = BlockSampler(range(24), 4)
    steps, seen = iter(sampler), []
    seen += [next(steps), next(steps)]
    assert len(sampler) == 6
    sampler.sizes.append((2, 8))
    seen += list(steps)
    assert [len(block) for block in seen] == [4, 4, 8, 8] and len(sampler) == 4
    assert sorted(row for block in seen for row in block) == list(range(24))


# Runs


class Recorder(Callback):
    """Keep the number of prompts of each rollout; save a checkpoint after every step."""

    def __init__(self, folder=None):
        self.folder, self.sizes, self.lengths, self.ends, self.validated, self.noise = folder, [], [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % pl_module.steps_per_rollout == 0:
            self.sizes.append(len(batch))
        self.noise.append(trainer.callback_metrics.get("train/gradient_noise_scale"))
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-{batch_idx:02d}.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        self.lengths.append(trainer.num_training_batches)
        self.ends.append(trainer.fit_loop.epoch_loop.batch_progress.current.completed)

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(trainer.global_step)


def checksum_reward(completion_ids, **kwargs):
    return [sum(ids) % 7 / 4 for ids in completion_ids]


def train(tiny, root, callback, save=None, ckpt_path=None, name="RLOO", trainer=None, **options):
    recorder = Recorder(save)
    runner = make_trainer(root, **{"max_epochs": 2, "callbacks": [callback, recorder], **(trainer or {})})
    module = make_module(name, tiny, rewards=[checksum_reward], **options)
    runner.fit(module, make_data(name, rows=40, batch_size=2), ckpt_path=ckpt_path)
    return module, recorder


def test_schedule_grows_linearly_over_epochs(tiny, tmp_path):
    module, recorder = train(tiny, tmp_path, BatchSchedule(maximum=8, updates=12))
    # 40 prompts per epoch; a rollout after u updates has 2 + 6 u / 12 of them, rounded down
    assert recorder.sizes == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 8]
    assert recorder.lengths == recorder.ends == [10, 5]
    assert recorder.validated == [0, 10, 15]  # at the start and at the end of each epoch
    assert module.trainer.global_step == 15
    assert float(module.trainer.callback_metrics["train/prompts"]) == 8


def test_batches_of_several_rounds_grow_by_whole_rollouts(tiny, tmp_path):
    options = dict(reward="checksum_reward", rounds=2)
    module, recorder = train(tiny, tmp_path, BatchSchedule(maximum=8, updates=8), **options)
    assert recorder.sizes[:6] == [2, 2, 2, 4, 4, 4] and recorder.sizes[-1] == 8
    assert float(module.trainer.callback_metrics["train/prompts"]) == 4 == len(module.rollout.prompts)
    with pytest.raises(ValueError, match=r"maximum=7 is sampled in dynamic_sampling.rounds=2 parts: give a multiple"):
        train(tiny, tmp_path, BatchSchedule(maximum=7, updates=8), **options)


def bar_totals(tiny, root, monkeypatch, callbacks=(), **options):
    """Return `(completed, total)` of the bar after each batch."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # otherwise plain lines are printed
    shown = []

    class Bar(lit_rlhf.callbacks.RLHFProgressBar):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            bar = self.progress.tasks[self.train_progress_bar_id]
            shown.append((bar.completed, bar.total))

    options = {"callbacks": [*callbacks, Bar()], "enable_progress_bar": True, "limit_val_batches": 0, **options}
    make_trainer(root, **options).fit(
        make_module("RLOO", tiny, rewards=[checksum_reward]), make_data("RLOO", rows=40, batch_size=2)
    )
    return shown


def test_bar_total_accounts_for_growth(tiny, tmp_path, monkeypatch):
    totals = bar_totals(tiny, tmp_path, monkeypatch, [BatchSchedule(maximum=8, updates=12)], max_epochs=2)
    assert totals == [(i + 1, 10) for i in range(10)] + [(i + 1, 5) for i in range(5)]  # 20 each without growth


def test_bar_total_accounts_for_max_steps(tiny, tmp_path, monkeypatch):
    totals = bar_totals(tiny, tmp_path, monkeypatch, max_steps=13, accumulate_grad_batches=2)
    assert totals == [(i + 1, 20) for i in range(20)] + [(i + 1, 6) for i in range(6)]


def test_plain_lines_omit_the_total_with_growing_batches(tiny, tmp_path, capsys):
    for callbacks, expected in (([], "step 20/20 "), ([BatchSchedule(maximum=8, updates=12)], "step 10 ")):
        bar = lit_rlhf.callbacks.RLHFProgressBar(seconds=0)
        options = dict(max_epochs=1, enable_progress_bar=True, limit_val_batches=0)
        trainer = make_trainer(tmp_path, callbacks=[*callbacks, bar], **options)
        trainer.fit(make_module("RLOO", tiny, rewards=[checksum_reward]), make_data("RLOO", rows=40, batch_size=2))
        assert expected in capsys.readouterr().out


def test_schedule_counts_updates_not_steps(tiny, tmp_path):
    options = dict(num_minibatches=2, trainer={"accumulate_grad_batches": 4, "max_epochs": 1})
    _, recorder = train(tiny, tmp_path, BatchSchedule(maximum=4, updates=2), **options)
    assert recorder.sizes == [2, 2, 3, 3, 4, 4, 4, 4, 4, 4][: len(recorder.sizes)]
    assert recorder.lengths == recorder.ends == [2 * len(recorder.sizes)] and len(recorder.sizes) % 2 == 0


@pytest.mark.parametrize(
    "make", [lambda: BatchSchedule(7, 9), lambda: AdaptiveBatch(9, 1, 2)], ids=["schedule", "noise"]
)
def test_resume_with_growing_batches_is_exact(make, tiny, tmp_path):
    options = dict(num_minibatches=2, trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5})
    uninterrupted, full = train(tiny, tmp_path, make(), save=tmp_path, **options)
    assert full.sizes[-1] > full.sizes[0]
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == sum(full.lengths)
    for path in paths[1::9]:
        resumed, rest = train(tiny, tmp_path, make(), ckpt_path=path, **options)
        weights = resumed.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in uninterrupted.state_dict().items()), path.name
        assert rest.sizes == full.sizes[len(full.sizes) - len(rest.sizes) :]
        assert rest.lengths == full.lengths[len(full.lengths) - len(rest.lengths) :]


def test_noisy_gradient_grows_the_batch_up_to_the_maximum(tiny, tmp_path):
    """A reward of pure noise has no expected gradient."""

    def noise(completion_ids, trainer_state, **kwargs):
        generator = torch.Generator().manual_seed(trainer_state.global_step)
        return torch.randn(len(completion_ids), generator=generator).tolist()

    recorder = Recorder()
    module = make_module("RLOO", tiny, rewards=[noise], kl_coef=0.0, lr=1e-6)
    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[AdaptiveBatch(8, 1, 2), recorder], limit_val_batches=0)
    trainer.fit(module, make_data("RLOO", rows=40, batch_size=2))
    sizes = recorder.sizes
    assert sizes[0] == 2 and sizes[-1] == 8
    assert all(before <= after <= 2 * before for before, after in itertools.pairwise(sizes))
    assert recorder.lengths == recorder.ends


@pytest.mark.parametrize(
    ("options", "accumulate", "prompts"),
    [({}, 1, 6), ({"num_minibatches": 2}, 1, 12), ({}, 3, 2), ({"num_minibatches": 2, "update_epochs": 2}, 2, 6)],
    ids=["one update a rollout", "two updates", "three rollouts an update", "two passes"],
)
@pytest.mark.filterwarnings("ignore:.* updates per rollout")
def test_prompts_per_update_follow_the_noise_scale(options, accumulate, prompts, tiny, tmp_path):
    class FixedNoiseScale(AdaptiveBatch):
        noise_scale = 6.0

    recorder = Recorder()
    module = make_module("RLOO", tiny, rewards=[checksum_reward], **options)
    limits = dict(max_epochs=1, accumulate_grad_batches=accumulate, limit_val_batches=0)
    trainer = make_trainer(tmp_path, callbacks=[FixedNoiseScale(13, 1, 2), recorder], **limits)
    trainer.fit(module, make_data("RLOO", rows=40, batch_size=2))
    assert recorder.sizes[0] == 2 and recorder.sizes[-1] == prompts


def test_noiseless_gradient_does_not_grow_the_batch(tiny, tmp_path):
    """A loss that does not depend on the samples has a gradient without noise."""

    class NoiselessLoss(lit_rlhf.RLOO):
        def loss(self, rollout):
            terms, metrics = super().loss(rollout)
            weight = next(p for p in self.policy.parameters() if p.requires_grad)
            return terms * 0 + 100 * weight.sum(), metrics

    recorder = Recorder()
    module = NoiselessLoss(
        str(tiny), rewards=[checksum_reward], num_samples=2, sampling=lit_rlhf.Sampling(max_new_tokens=4)
    )
    trainer = make_trainer(tmp_path, max_epochs=1, callbacks=[AdaptiveBatch(8, 1, 2), recorder], limit_val_batches=0)
    trainer.fit(module, make_data("RLOO", rows=40, batch_size=2))
    assert set(recorder.sizes) == {2}
    assert all(float(noise) < 1e-3 for noise in recorder.noise)


# The measurement


def test_estimates_are_unbiased():
    """Gradients are sampled with a known mean and variance."""
    torch.manual_seed(0)
    mean, deviation, parts, size = torch.tensor([0.5, -1.0, 0.2]), 2.0, 4, 3
    samples = mean + deviation * torch.randn(20_000, parts, size, 3, dtype=torch.float64)
    gradients = samples.mean(2)
    estimates = [F.gradient_noise(float((g**2).sum()), float((g.mean(0) ** 2).sum()), parts, size) for g in gradients]
    variance, square = torch.tensor(estimates).mean(0).tolist()
    assert variance == pytest.approx(3 * deviation**2, rel=0.02)
    assert square == pytest.approx(float((mean**2).sum()), abs=0.02)


@pytest.mark.parametrize("name", ["RLOO", "PPO"])
def test_measuring_does_not_change_training(name, tiny, tmp_path):
    options = dict(name=name, num_minibatches=2, trainer={"max_steps": 6, "gradient_clip_val": 0.5})
    measured, recorder = train(tiny, tmp_path, GradientNoise(1, 2), **options)
    plain, _ = train(tiny, tmp_path, Callback(), **options)
    weights = plain.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in measured.state_dict().items())
    assert all(0 < float(noise) < math.inf for noise in recorder.noise)
    assert measured.trainer.callback_metrics["train/gradient_variance"] > 0


def test_variance_equals_the_variance_of_the_gradients_of_the_parts(tiny, tmp_path):
    """Compute the gradient of each part of one rollout separately."""
    seen = {}

    class GradientsOfParts(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen["rollout"] = pl_module.rollout
            parameters = [p for p in pl_module.parameters() if p.requires_grad]
            gradients = []
            for rows in (slice(0, 2), slice(2, 4)):
                with torch.enable_grad():
                    _, terms, mask, _ = pl_module.loss_terms(pl_module.rollout.rows(rows))
                loss = terms[mask].mean()
                gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
            seen["variance"] = float(torch.stack(gradients).var(0).sum()) / 2  # of the mean of two parts

    module = make_module("RLOO", tiny, rewards=[checksum_reward])
    trainer = make_trainer(
        tmp_path, max_steps=1, callbacks=[GradientsOfParts(), GradientNoise(1, 2)], limit_val_batches=0
    )
    trainer.fit(module, make_data("RLOO", rows=40, batch_size=4))
    assert float(trainer.callback_metrics["train/gradient_variance"]) == pytest.approx(seen["variance"], rel=1e-3)


def variance_of(tiny, root, **options):
    """Return the gradient variance of the first update, on 8 prompts in 4 parts."""
    trainer = {"max_steps": 1, "limit_val_batches": 0, **options.pop("trainer", {})}
    runner = make_trainer(root, callbacks=[GradientNoise(1, 4)], **trainer)
    runner.fit(
        make_module("RLOO", tiny, rewards=[checksum_reward], **options), make_data("RLOO", rows=40, batch_size=8)
    )
    return float(runner.callback_metrics["train/gradient_variance"])


def test_variance_is_per_update_not_per_rollout(tiny, tmp_path):
    full = variance_of(tiny, tmp_path)
    assert variance_of(tiny, tmp_path, num_minibatches=4, trainer={"accumulate_grad_batches": 4}) == pytest.approx(full)
    half = variance_of(tiny, tmp_path, num_minibatches=4, trainer={"accumulate_grad_batches": 2})
    assert half == pytest.approx(2 * full)


def test_updates_of_several_rollouts_are_measured(tiny, tmp_path):
    options = dict(trainer={"accumulate_grad_batches": 5, "max_epochs": 3})
    _, recorder = train(tiny, tmp_path, AdaptiveBatch(4, 2, 2), **options)
    assert recorder.noise[-1] is not None


def test_gradient_of_a_separate_critic_is_excluded(tiny, tmp_path):
    variances = []
    for coef in (0.5, 50.0):
        module = make_module("VanillaPG", tiny, rewards=[checksum_reward], vf_coef=coef)
        trainer = make_trainer(tmp_path, max_steps=1, callbacks=[GradientNoise(1, 4)], limit_val_batches=0)
        torch.manual_seed(3)  # the critic's head
        trainer.fit(module, make_data("VanillaPG", rows=40, batch_size=8))
        variances.append(float(trainer.callback_metrics["train/gradient_variance"]))
    assert variances[0] == pytest.approx(variances[1], rel=1e-6)


def test_leave_one_out_baseline_has_less_variance_than_none(tiny, tmp_path):
    def far_from_zero(completion_ids, **kwargs):
        return [20 + value for value in checksum_reward(completion_ids)]

    variance = {}
    for name, options in {"RLOO": {}, "Reinforce": {"baseline": "none"}}.items():
        module = make_module(name, tiny, rewards=[far_from_zero], num_samples=4, **options)
        trainer = make_trainer(tmp_path, max_steps=1, callbacks=[GradientNoise(1, 4)], limit_val_batches=0)
        trainer.fit(module, make_data(name, rows=40, batch_size=16))
        variance[name] = float(trainer.callback_metrics["train/gradient_variance"])
    assert variance["RLOO"] < 0.1 * variance["Reinforce"]


def test_noise_scale_is_infinite_for_a_nonpositive_squared_norm():
    noise = GradientNoise()
    assert noise.noise_scale is None
    noise.load_state_dict({"averages": [2.0, -0.1]})
    assert noise.noise_scale == math.inf
    noise.load_state_dict({"averages": [2.0, 0.5]})
    assert noise.noise_scale == 4


# Invalid input


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GradientNoise(every_n_rollouts=0), "every_n_rollouts=0"),
        (lambda: GradientNoise(parts=1), "parts=1"),
        (lambda: GradientNoise(smoothing=1.0), "smoothing=1"),
        (lambda: BatchSchedule(0, 5), "maximum=0"),
        (lambda: BatchSchedule(5, 0), "updates=0"),
    ],
)
def test_numbers_out_of_range_raise(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("callback", "name", "data", "sentence"),
    [
        (BatchSchedule(1, 5), "RLOO", {}, "maximum=1 is below data.batch_size=4"),
        (BatchSchedule(99, 5), "RLOO", {}, "maximum=99 needs 99 rows .* the data have 12"),
        (BatchSchedule(8, 5), "RLOO", {"num_workers": 1}, "num_workers=0"),
        (GradientNoise(), "SFT", {}, "GradientNoise needs a method that samples, and SFT does not"),
        (AdaptiveBatch(8), "SFT", {}, "AdaptiveBatch needs a method that samples"),
        (GradientNoise(parts=9), "RLOO", {}, "4 prompts can't be split into 9 parts"),
    ],
)
def test_unsuitable_data_or_algorithms_raise(callback, name, data, sentence, tiny, tmp_path):
    module = make_module(name, tiny, **({"rewards": [checksum_reward]} if name == "RLOO" else {}))
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[callback], limit_val_batches=0)
    with pytest.raises(ValueError, match=sentence):
        trainer.fit(module, make_data(name, **data))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: BatchSchedule(7, 9), lambda: AdaptiveBatch(9, 1, 2)], ids=["schedule", "noise"]
)
def test_adding_growth_on_resume_keeps_the_rows_already_yielded(make, tiny, tmp_path):
    options = dict(num_minibatches=2, trainer={"accumulate_grad_batches": 2})
    train(tiny, tmp_path, Callback(), save=tmp_path, **options)
    _, full = train(tiny, tmp_path, Callback(), ckpt_path=tmp_path / "0-09.ckpt", **options)
    _, joined = train(tiny, tmp_path, make(), ckpt_path=tmp_path / "0-09.ckpt", **options)
    assert full.sizes[0] == 2 and joined.sizes[0] >= 2 and joined.sizes[-1] > 2
    first_epoch = joined.sizes[: (joined.lengths[0] - 10) // 2]
    assert (
        40 - 9 < 5 * 2 + sum(first_epoch) <= 40
    )  # five rollouts of two prompts before the resume, then the remaining rows


def test_growth_with_reloaded_dataloaders_raises(tiny, tmp_path):
    with pytest.raises(ValueError, match="remove reload_dataloaders_every_n_epochs=1"):
        train(tiny, tmp_path, BatchSchedule(8, 2), trainer={"reload_dataloaders_every_n_epochs": 1})


def test_second_fit_grows_from_its_own_batch_size(tiny, tmp_path):
    callback = BatchSchedule(8, 2)
    sizes = []
    for _ in range(2):
        train(tiny, tmp_path, callback)
        sizes.append(callback.sizes)
    assert sizes[0] == sizes[1]


@pytest.mark.filterwarnings("ignore:a prompt without a reward")
def test_parts_without_valid_completions_are_excluded(tiny, tmp_path):
    """With fewer than two parts with a reward there is no estimate; other parts are excluded."""

    def first_only(prompts, completions, **kwargs):
        asked = list(dict.fromkeys(prompts))[: first_only.prompts]
        pairs = zip(prompts, completions, strict=True)
        return [float(len(text)) if prompt in asked else None for prompt, text in pairs]

    variances = {}
    for number in (1, 2, 4):
        first_only.prompts = number
        trainer = make_trainer(tmp_path, max_steps=1, callbacks=[GradientNoise(1, 4)], limit_val_batches=0)
        trainer.fit(make_module("RLOO", tiny, rewards=[first_only]), make_data("RLOO"))
        variances[number] = trainer.callback_metrics.get("train/gradient_variance")
    assert variances[1] is None and variances[2] > 0 and variances[4] > 0
