"""Policies with quantized weights, where bitsandbytes is installed: adapters, references, exports and refusals."""

import importlib.util

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from transformers.quantizers import quantizer_bnb_4bit

from lit_rlhf.cli.checkpoints import export
from lit_rlhf.errors import InputError
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.quantized import check_unsharded
from runs import differing_tensors, make_data, make_module, make_trainer, training_state

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
LORA = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}
BITS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:.* computes each prompt once per completion")  # 8 bit in float32


def quantized(name, folder, bits="4bit", **options):
    torch.manual_seed(0)
    return make_module(name, folder, load={"quantization_config": BITS[bits]}, **{"lora": LORA, **options})


def fit(module, name, root, steps, **options):
    trainer = make_trainer(root, max_steps=steps, limit_val_batches=1)
    trainer.fit(module, datamodule=make_data(name), **options)
    return trainer


PAIRS = [(name, bits) for name in ("RLOO", "PPO", "DPO", "SFT", "RewardModeling") for bits in BITS]
QUICK = [("RLOO", "4bit"), ("RewardModeling", "8bit")]


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("name", "bits"), [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_an_adapter_is_trained_and_a_run_resumes(name, bits, wide, tmp_path):
    options = {"gradient_checkpointing": True}
    whole = fit(quantized(name, wide, bits, **options), name, tmp_path, 3)
    part = fit(quantized(name, wide, bits, **options), name, tmp_path, 2)
    part.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in key or "score" in key for key in saved)
    resumed = quantized(name, wide, bits, **options)
    trainer = fit(resumed, name, tmp_path, 3, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert differing_tensors(training_state(trainer), training_state(whole)) == []


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_the_reference_is_the_adapter_switched_off(bits, wide, tmp_path):
    module = quantized("RLOO", wide, bits)
    fit(module, "RLOO", tmp_path, 3)
    prompts, completions = module.rollout.prompts, module.rollout.completions
    start = Policy.from_pretrained(wide, quantization_config=BITS[bits])
    start.model_forward.shares_prompt, start.model_forward.head_apart = module.policy.shares_prompt, True
    expected = start.logprobs(prompts, completions).detach()
    assert torch.equal(module.reference.logprobs(prompts, completions), expected)
    assert not torch.equal(module.policy.logprobs(prompts, completions), expected)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(20, 40).view(2, 10)).logits


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_exports_are_the_adapter_or_the_trained_model_merged(bits, wide, tmp_path):
    module = quantized("RLOO", wide, bits)
    trainer = fit(module, "RLOO", tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trained = module.policy.model.train()  # in evaluation mode bitsandbytes rounds activations on a CPU
    module.export(tmp_path / "adapter")
    export(tmp_path / "run.ckpt", tmp_path / "adapter of the checkpoint")
    for folder in ("adapter", "adapter of the checkpoint"):
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / folder, quantization_config=BITS[bits])
        torch.testing.assert_close(logits(loaded.train()), logits(trained), atol=1e-5, rtol=0)
    merged = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run.ckpt", tmp_path / "merged", merge=True))
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-4, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(wide)
    assert (logits(plain) - logits(trained)).abs().max() > 0.5


@needs_bitsandbytes
def test_what_can_not_be_trained_is_refused(wide, tmp_path):
    with pytest.raises(InputError, match="the policy's weights are quantized, so they can't be trained: give `lora`"):
        fit(quantized("SFT", wide, lora=None), "SFT", tmp_path, 1)
    policy = Policy.from_pretrained(wide, quantization_config=BITS["4bit"])
    memory = Policy(policy.model, policy.tokenizer, lora=LORA)
    with pytest.raises(InputError, match="the policy is quantized and in memory"):
        fit(make_module("SFT", wide, lr=1e-3).__class__(memory), "SFT", tmp_path, 1)


def test_sharding_is_refused():
    with pytest.raises(InputError, match=r"quantized weights can't be sharded: use --trainer.strategy ddp"):
        check_unsharded({"quantization_config": BITS["4bit"]}, sharded=True)


def test_a_missing_package_is_named(wide, monkeypatch):
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match=r"bitsandbytes, which is not installed: pip install 'lit_rlhf\[quantized\]'"):
        Policy.from_pretrained(wide, quantization_config=BITS["4bit"])


def test_an_unknown_method_is_refused(wide):
    with pytest.raises(InputError, match=r"quantization_config without a known method: give \{load_in_4bit: true}"):
        Policy.from_pretrained(wide, quantization_config={"load_in_3bit": True})
