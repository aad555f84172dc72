"""Adapters of every kind: trained, exported and merged as they are, or refused."""

import json

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig, Qwen2Config, Qwen2ForCausalLM

import lit_rlhf
from lit_rlhf.errors import InputError
from lit_rlhf.models.export import export_checkpoint
from runs import make_data, make_module, make_trainer
from tiny import make_llama, make_tokenizer

IDS = torch.arange(8, 24).view(2, 8)
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, **TARGETS),
    "lora and biases": lambda: peft.LoraConfig(r=2, bias="all", **TARGETS),
    "ranks by layer": lambda: peft.LoraConfig(r=2, rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 5}, **TARGETS),
    "rslora and dora": lambda: peft.LoraConfig(r=2, use_rslora=True, use_dora=True, **TARGETS),
    "ia3": lambda: peft.IA3Config(**TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=2, **TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=2, **TARGETS),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, **TARGETS),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **TARGETS),
}


@torch.no_grad()
def logits(model):
    training = model.training
    output = model.eval()(input_ids=IDS).logits
    model.train(training)
    return output


def make_base():
    """A model with biases, tied embeddings and weights other than those at which a kind of adapter starts."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    options = dict(num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True)
    config = Qwen2Config(vocab_size=len(make_tokenizer()), **sizes, **options)
    return Qwen2ForCausalLM(config)


def write_adapter(root, config, base=make_base):
    """Write a base model and an adapter that changes it."""
    for part in (model := base(), make_tokenizer()):
        part.save_pretrained(root / "base")
    config.task_type = "CAUSAL_LM"
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(root / "adapter")
    assert (logits(adapted) - logits(model)).abs().max() > 0.01
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_exported_and_merged(kind, tmp_path):
    saved = write_adapter(tmp_path, KINDS[kind]())
    module = make_module("SFT", tmp_path / "adapter")
    module.configure_model()
    torch.testing.assert_close(logits(module.policy.model), logits(saved))
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(module, make_data("SFT"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected = logits(module.policy.model)
    assert (expected - logits(saved)).abs().max() > 1e-3
    again = make_module("SFT", tmp_path / "adapter")
    make_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(again, make_data("SFT"), ckpt_path=trainer.ckpt_path)
    exported = AutoPeftModelForCausalLM.from_pretrained(export_checkpoint(tmp_path / "last.ckpt", tmp_path / "out"))
    torch.testing.assert_close(logits(exported), expected, atol=1e-5, rtol=0)
    merged = export_checkpoint(tmp_path / "last.ckpt", tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_whose_start_changed_its_base_model_is_refused(start, tmp_path):
    write_adapter(tmp_path, peft.LoraConfig(r=2, init_lora_weights=start, **TARGETS))
    with pytest.raises(InputError, match=f"'{start}', which changed the base model .*path_initial_model_for_weight"):
        lit_rlhf.Policy.from_pretrained(tmp_path / "adapter")


def test_an_adapter_whose_base_model_has_moved_says_where_to_write_it(tmp_path):
    write_adapter(tmp_path, peft.LoraConfig(r=2))
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError,
        match=r"no such folder.* base model of .*adapter.*: if it has moved, change base_model_name_or_path",
    ):
        lit_rlhf.Policy.from_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "elsewhere")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert lit_rlhf.Policy.from_pretrained(tmp_path / "adapter").loaded


# In memory


def adapted(*names, **options):
    model = get_peft_model(make_base(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options), names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    return model


def test_an_adapter_of_any_name_is_exported(tmp_path):
    module = lit_rlhf.SFT(lit_rlhf.Policy(adapted("polite"), make_tokenizer()))
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(module, make_data("SFT"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    exported = AutoModelForCausalLM.from_pretrained(export_checkpoint(tmp_path / "last.ckpt", tmp_path / "out"))
    torch.testing.assert_close(logits(exported), logits(module.policy.model), atol=1e-5, rtol=0)


def test_several_adapters_and_merged_ones_are_refused():
    with pytest.raises(InputError, match=r"has 2 adapters \(one, two\): keep one, with delete_adapter"):
        lit_rlhf.Policy(adapted("one", "two"), make_tokenizer())
    merged = adapted("one")
    merged.merge_adapter()
    with pytest.raises(InputError, match="merged into its weights, and would not be trained: unmerge it first"):
        lit_rlhf.Policy(merged, make_tokenizer())


def test_lora_for_a_router_that_is_no_plain_layer_is_refused():
    sizes = dict(hidden_size=32, intermediate_size=32, intermediate_size_mlp=64, num_hidden_layers=2, head_dim=8)
    options = dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, interleave_moe_layer_step=1)
    model = Llama4ForCausalLM(Llama4TextConfig(vocab_size=len(make_tokenizer()), **sizes, **options))
    with pytest.raises(InputError, match=r"'router' is a Llama4Router, .* exclude_modules: \[router\]"):
        lit_rlhf.Policy(model, make_tokenizer(), lora={"r": 2, "target_modules": "all-linear"})


# Merging


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merging_into_16_bits_keeps_small_updates(dtype, tmp_path):
    for part in (make_llama(len(make_tokenizer())).to(getattr(torch, dtype)), make_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    options = dict(lr=1e-5, lora={"r": 2, "target_modules": ["q_proj"]}, load={"dtype": dtype})
    module = make_module("SFT", tmp_path / "base", **options)
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(module, make_data("SFT"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    layer = module.policy.causal_lm.model.layers[0].self_attn.q_proj
    update = layer.get_delta_weight("default")
    assert 1e-6 < update.abs().max() < 1e-4
    module.policy.loaded = False  # as for a base model in memory
    module.export(tmp_path / "policy")
    for folder in (tmp_path / "policy", export_checkpoint(tmp_path / "last.ckpt", tmp_path / "merged", merge=True)):
        merged = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn.q_proj.weight
        torch.testing.assert_close(merged - layer.base_layer.weight.float(), update, atol=1e-7, rtol=0)
