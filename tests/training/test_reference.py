"""The reference of the KL by choice: the policy's initial state, another model, or none."""

import json
import math

import pytest
import torch

import lit_rlhf
from lit_rlhf.callbacks import KLMonitor, RLHFProgressBar, SampleLogger, Summary
from lit_rlhf.errors import InputError
from lit_rlhf.models.reference import Reference
from runs import ONLINE, make_data, make_module, make_trainer, training_state
from tiny import make_llama, make_tokenizer


def fit(name, folder, root, *, callbacks=(), **options):
    options = {"critic": "head", **options} if name in ("PPO", "VanillaPG") else options
    module = make_module(name, folder, **options)
    trainer = make_trainer(root, max_steps=2, callbacks=list(callbacks), enable_progress_bar=bool(callbacks))
    trainer.fit(module, datamodule=make_data(name))
    return module, trainer


def pair_judge(prompts, completions, others, **kwargs):
    return [0.5] * len(prompts)


pair_judge.pairwise = True


@pytest.mark.parametrize("name", [name for name in ONLINE if name != "OnlineDPO"])
def test_without_a_reference_none_is_held_and_the_same_is_learned(name, tiny, tmp_path, monkeypatch):
    _, kept = fit(name, tiny, tmp_path, kl_coef=0.0)
    for method in ("__init__", "logprobs", "sample"):
        monkeypatch.setattr(Reference, method, lambda *args, **kwargs: pytest.fail("a reference is made or run"))
    module, trainer = fit(name, tiny, tmp_path, kl_coef=0.0, reference=None)
    assert module.reference is None and module.rollout.reference_logprobs is None
    for name, value in training_state(kept).items():
        assert torch.equal(training_state(trainer)[name], value), name
    kl = {n for n in kept.callback_metrics if "kl" in n.split("/")[1] and n != "train/kl_coef"}
    won = {n for n in kept.callback_metrics if "win_rate" in n} | {"val/undecided"}
    assert {"train/kl", "train/kl_k3", "val/kl"} <= kl
    assert set(kept.callback_metrics) - set(trainer.callback_metrics) == kl | won
    assert trainer.callback_metrics["val/return"] == trainer.callback_metrics["val/reward"]


def test_displays_and_files_leave_the_kl_out(tiny, tmp_path, capsys):
    callbacks = [KLMonitor(), SampleLogger(), Summary(), RLHFProgressBar(seconds=0)]
    _, trainer = fit("RLOO", tiny, tmp_path, kl_coef=0.0, reference=None, callbacks=callbacks)
    rows = [json.loads(line) for line in next(tmp_path.rglob("samples.jsonl")).read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "val"} and all(row["kl"] is None for row in rows)
    assert not any(math.isnan(value) for value in trainer.callback_metrics.values())
    shown = capsys.readouterr().out
    assert "reward" in shown and " kl " not in shown and "KL (nats" not in shown


def test_another_model_can_be_the_reference(tiny, tmp_path):
    other = tmp_path / "other"
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer), seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    module, _ = fit("RLOO", tiny, tmp_path, lora={"r": 2}, reference=str(other))
    rollout, teacher = module.rollout, lit_rlhf.Policy.from_pretrained(other)
    expected = teacher.logprobs(rollout.prompts, rollout.completions, module.sampling.temperature)
    torch.testing.assert_close(rollout.reference_logprobs, expected.detach())
    pairs, _ = fit("DPO", tiny, tmp_path, reference=str(other))
    torch.testing.assert_close(
        pairs.reference._policy.causal_lm.lm_head.weight, teacher.causal_lm.lm_head.weight, rtol=0, atol=0
    )


def test_a_teacher_as_the_reference_is_on_policy_distillation(tiny, tmp_path):
    """With a reward of 0 the KL to another model falls, and no warning says that there is nothing to learn from."""
    teacher = tmp_path / "teacher"
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer), seed=5).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    options = dict(rewards=[lit_rlhf.rewards.Zero()], kl_coef=1.0, reference=str(teacher), num_samples=8, lr=3e-3)
    module = make_module("RLOO", tiny, **options)
    kl = []

    class Record(lit_rlhf.callbacks.KLMonitor):
        def on_train_batch_end(self, trainer, *args):
            kl.append(float(trainer.callback_metrics["train/kl"]))

    make_trainer(tmp_path, max_steps=40, callbacks=[Record()], limit_val_batches=0).fit(
        module, make_data("RLOO", rows=32)
    )
    assert sum(kl[-8:]) < 0.8 * sum(kl[:8])


@pytest.mark.parametrize("before", [dict(reference=None), dict()], ids=["none", "policy"])
def test_a_run_resumes_with_and_without_a_reference(before, tiny, tmp_path):
    _, trainer = fit("RLOO", tiny, tmp_path, lora={"r": 2}, kl_coef=0.0, **before)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    after = dict() if before else dict(reference=None)
    module, trainer = (
        make_module("RLOO", tiny, lora={"r": 2}, kl_coef=0.0, **after),
        make_trainer(tmp_path, max_steps=3),
    )
    trainer.fit(module, datamodule=make_data("RLOO"), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert trainer.global_step == 3


def foreign(folder):
    tokenizer = make_tokenizer()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary["model"]["vocab"]["Q"], vocabulary["model"]["vocab"]["Z"] = (
        vocabulary["model"]["vocab"]["Z"],
        vocabulary["model"]["vocab"]["Q"],
    )
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    return folder


def test_what_needs_a_reference_says_so(tiny, tmp_path):
    with pytest.raises(InputError, match=r"kl_coef=0.05 needs a reference, and reference is null"):
        make_module("GRPO", tiny, reference=None)
    for name in ("DPO", "IPO"):
        with pytest.raises(InputError, match=f"{name} compares the policy with a reference"):
            make_module(name, tiny, reference=None)
    with pytest.raises(InputError, match=r"evaluation.judge compares with completions of the reference"):
        make_module("RLOO", tiny, kl_coef=0.0, reference=None, judge=pair_judge)
    with pytest.raises(InputError, match=r"kl_monitor.target=5.0 needs a reference"):
        fit("RLOO", tiny, tmp_path, kl_coef=0.0, reference=None, callbacks=[KLMonitor(5.0)])
    with pytest.raises(InputError, match=r"the reference '.*' has id \d+ for '[QZ]', and the policy has"):
        fit("RLOO", tiny, tmp_path, reference=str(foreign(tmp_path / "foreign")))
