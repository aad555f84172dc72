"""Progress bar, curves and summary."""

import io
import re
import sys

import pytest
import rich
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from fake_algorithm import FakeAlgorithm, FakeOnlineAlgorithm
from lit_rlhf import callbacks
from lit_rlhf.callbacks import Curves, PolicyCheckpoint, RLHFProgressBar, SampleLogger, Summary
from lit_rlhf.models.sampling import Sampling


def fit(make_trainer, *callbacks, module=None, **flags):
    if any(isinstance(c, RLHFProgressBar) for c in callbacks):
        flags["enable_progress_bar"] = True
    trainer = make_trainer(*callbacks, **flags)
    trainer.fit(module or FakeOnlineAlgorithm(), ckpt_path=flags.pop("ckpt_path", None))
    return trainer


def test_without_a_terminal_plain_lines_are_printed(make_trainer, capsys):
    fit(make_trainer, RLHFProgressBar(seconds=0.0))
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 12 + 3 and not any("\x1b" in line for line in out)
    assert re.fullmatch(r"step 1/12 reward 0\.5 kl 1\.5 loss 2 \(\d+ s\)", out[0])
    assert re.fullmatch(r"validation at step 4 reward 0\.3 win_rate 0\.54 kl 0\.4 \(\d+ s\)", out[4])


def test_plain_lines_respect_the_minimum_interval(make_trainer, capsys):
    fit(make_trainer, RLHFProgressBar(seconds=3600.0))
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.fixture
def terminal(monkeypatch):
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=160)
    monkeypatch.setattr(rich, "_console", console)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    return out


@pytest.mark.parametrize("leave", [False, True])
def test_bar_on_a_terminal_shows_reward_and_kl(make_trainer, terminal, tmp_path, leave):
    bar = RLHFProgressBar(leave=leave)
    bar._console_kwargs = {"file": terminal, "force_terminal": True, "width": 160}
    fit(make_trainer, bar, num_sanity_val_steps=1, max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    text = terminal.getvalue()
    assert "reward:" in text and "kl:" in text and "12/12" in text
    assert "v_num" not in text and "train/" not in text


def test_curves_are_drawn_and_continued_by_a_resumed_run(make_trainer, tmp_path):
    pytest.importorskip("matplotlib")
    checkpoint = PolicyCheckpoint()
    fit(make_trainer, curves := Curves(), checkpoint, max_steps=7)
    assert (tmp_path / "version_0" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in curves.history["train/kl"]] == [1, 3, 5, 7]
    trainer = make_trainer(resumed := Curves(), PolicyCheckpoint())
    trainer.fit(FakeOnlineAlgorithm(), ckpt_path=checkpoint.last_path)
    assert [step for step, _ in resumed.history["train/kl"]] == [1, 3, 5, 7, 9, 11]
    assert resumed.history["val/reward"] == [(4, pytest.approx(0.3)), (8, pytest.approx(0.2)), (12, pytest.approx(0.4))]
    assert (tmp_path / "version_1" / "curves.png").exists()


def test_a_long_curve_keeps_evenly_spaced_points(tmp_path):
    whole, resumed = Curves(), Curves()
    for step in range(10_000):
        if step == 4_321:
            resumed.load_state_dict(whole.state_dict())
        whole._add("train/kl", step, 0.0)
        if step >= 4_321:
            resumed._add("train/kl", step, 0.0)
    assert [step for step, _ in whole.history["train/kl"]] == list(range(0, 10_000, 16))
    assert resumed.history == whole.history


def test_a_full_disk_does_not_end_a_run(make_trainer, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lit_rlhf.callbacks.curves.draw", full)
    monkeypatch.setattr("lit_rlhf.callbacks.samples._append", full)
    with (
        pytest.warns(UserWarning, match=r"curves.png could not be written \(No space"),
        pytest.warns(UserWarning, match=r"samples.jsonl could not be written \(No space"),
    ):
        assert fit(make_trainer, Curves(), SampleLogger()).global_step == 12


@pytest.mark.parametrize("seconds, drawings", [(0.0, 3 + 1), (3600.0, 1)])
def test_curves_are_drawn_at_intervals_and_at_the_end(make_trainer, tmp_path, monkeypatch, seconds, drawings):
    drawn = []
    monkeypatch.setattr(
        "lit_rlhf.callbacks.curves.draw", lambda history, path: drawn.append(len(history["val/reward"]))
    )
    fit(make_trainer, Curves(every_n_seconds=seconds))
    assert len(drawn) == drawings and drawn[-1] == 3


def test_curves_with_negative_interval_raise():
    with pytest.raises(ValueError, match="every_n_seconds=-1 must be at least 0"):
        Curves(every_n_seconds=-1)


def test_without_matplotlib_no_curves_are_drawn(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rlhf.callbacks.curves.find_spec", lambda name: None)
    fit(make_trainer, Curves())
    assert not list(tmp_path.rglob("curves.png"))


class ValidateFirst(Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True


def test_summary_compares_before_and_after_and_lists_the_output_files(make_trainer, tmp_path, capsys):
    module = FakeOnlineAlgorithm()
    fit(make_trainer, Summary(), PolicyCheckpoint(), ValidateFirst(), module=module, num_sanity_val_steps=1)
    out = capsys.readouterr().out
    rows = {
        key: values for key, *values in (re.split(r"\s*[│┃]\s*", line)[1:4] for line in out.splitlines() if "│" in line)
    }
    assert "before" in out and "after 12 updates" in out
    assert rows["reward"] == ["0.1", "0.4"] and rows["style"] == ["0", "12"] and rows["win rate"] == ["0.5", "0.62"]
    assert rows["KL (nats per completion)"] == ["0", "1.2"]
    assert out.count("answer 0") == out.count("answer 12") == 3 and "prompt 2" in out
    for path in ("policy/last", "policy/best", "version_0/checkpoints/last.ckpt"):
        assert str(tmp_path / path) in out


def test_summary_says_what_the_run_will_do(make_trainer, monkeypatch, capsys):
    monkeypatch.setattr("lit_rlhf.callbacks.summary.cpu_advice", lambda threads, own: "busy")
    fit(make_trainer, Summary(), checkpoint := PolicyCheckpoint(), max_steps=6)
    lines = capsys.readouterr().out.splitlines()
    sizes = ["trained       2 of 2 weights", "each update   rows of your loader", "this run      6 updates"]
    assert lines[:3] == sizes
    assert [line for line in lines if line.startswith("CPU")] == ["CPU           busy"]  # once
    module = FakeOnlineAlgorithm()
    module.sampling = Sampling(max_new_tokens=4)
    make_trainer(Summary(), PolicyCheckpoint()).fit(module, ckpt_path=checkpoint.last_path)
    lines = capsys.readouterr().out.splitlines()
    assert "updates       2 per rollout: off-policy after the first, not corrected" in lines
    assert "this run      12 updates, of which 6 are done, 6 rollouts" in lines


def test_summary_of_a_resumed_run_keeps_the_first_validation(make_trainer, capsys):
    fit(make_trainer, Summary(), checkpoint := PolicyCheckpoint(), ValidateFirst(), max_steps=5)
    capsys.readouterr()
    make_trainer(Summary(), PolicyCheckpoint()).fit(FakeOnlineAlgorithm(), ckpt_path=checkpoint.last_path)
    assert "answer 0" in (out := capsys.readouterr().out) and "answer 12" in out


def test_summary_of_a_run_without_validation_lists_only_files(make_trainer, tmp_path, capsys):
    fit(make_trainer, Summary(), module=FakeAlgorithm(), limit_val_batches=0)
    out = capsys.readouterr().out
    assert "held-out" not in out and str(tmp_path / "version_0") in out


NEED_REAL_ALGORITHMS = ("AdaptiveBatch", "BatchSchedule", "GradientNoise")  # the fakes lack what they read


@pytest.mark.parametrize("name", [name for name in callbacks.__all__ if name not in NEED_REAL_ALGORITHMS])
def test_every_callback_is_built_from_a_config_and_runs_with_every_algorithm(make_trainer, name):
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    built = parser.instantiate(parser.parse_args([f"--callbacks+=lit_rlhf.callbacks.{name}"])).callbacks
    assert type(built[0]) is getattr(callbacks, name)
    modules = [FakeOnlineAlgorithm()] if name == "AdaptiveKL" else [FakeAlgorithm(), FakeOnlineAlgorithm()]
    for module in modules:  # AdaptiveKL needs a kl_coef
        trainer = fit(make_trainer, *built, module=module)
        assert trainer.global_step == 12
        assert torch.isfinite(module.weights).all()
    trainer.validate(module, verbose=False)
