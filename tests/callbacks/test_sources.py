"""A run never replaces a folder that it read one of its models from."""

import json

import pytest
from transformers import AutoModelForCausalLM

import lit_rlhf
from lit_rlhf.callbacks import PolicyCheckpoint
from lit_rlhf.callbacks.sources import is_source, model_folders
from runs import make_data, make_module, make_trainer, vowels


class Holder:
    def __init__(self, **values):
        vars(self).update(values)


def test_model_folders_are_found_wherever_they_are_named(tmp_path, tiny):
    adapter, outer, link = tmp_path / "adapter", tmp_path / "outer", tmp_path / "link"
    for folder, base in ((adapter, tiny), (outer, adapter)):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    link.symlink_to(tiny)
    found = {tiny.resolve()}
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for value in (str(link), tiny, model, [Holder(reward=Holder(path=str(tiny)))], {"a": (str(tiny),)}, adapter):
        assert model_folders(value) - {adapter.resolve()} == found, value
    assert model_folders(str(outer)) == found | {adapter.resolve(), outer.resolve()}
    assert model_folders("org/model", "", "x" * 5000, "a\0b", "~nobody/x", None, 3, str(tmp_path)) == set()


def test_what_would_be_replaced_is_a_source(tmp_path):
    assert is_source(tmp_path / "last", [tmp_path / "last"])
    assert is_source(tmp_path / "last", [tmp_path / "last" / "nested"])
    assert not is_source(tmp_path / "last", [tmp_path, tmp_path / "last-2"])


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("role", ["policy", "critic", "reward"])
def test_a_second_stage_in_its_own_root_keeps_its_start(role, tiny, tmp_path):
    def run(method, module, steps, ckpt_path=None):
        options = dict(enable_checkpointing=True, max_steps=steps, max_epochs=9)
        trainer = make_trainer(tmp_path, callbacks=[checkpoint := PolicyCheckpoint()], **options)
        trainer.fit(module, make_data(method), ckpt_path=ckpt_path)
        return checkpoint, float(trainer.callback_metrics.get("train/kl", 0.0))

    first = "RewardModeling" if role == "reward" else "RLOO"
    run(first, make_module(first, tiny), 1)
    start = tmp_path / "policy" / "last"
    before = weights(start)
    policy = start if role == "policy" else tiny
    method, options = "RLOO", {}
    if role == "critic":
        method, options = "PPO", {"critic": str(start)}
    elif role == "reward":
        options = {"rewards": [vowels, lit_rlhf.RewardModel(start)]}
    checkpoint, _ = run(method, make_module(method, policy, **options), 3)
    assert weights(start) == before
    assert weights(checkpoint.policies["last"]) != before
    assert checkpoint.policies["last"] == checkpoint.last_path.parents[1] / "policy" / "last"
    _, kl = run(method, make_module(method, policy, **options), 5, ckpt_path=checkpoint.last_path)
    assert kl > 0.01
