"""Exported folders, loaded by transformers or PEFT alone, give the logits of the trained policy."""

import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

import lit_rlhf
from lit_rlhf.models.export import export_checkpoint
from runs import make_data, make_trainer
from tiny import make_llama, make_tokenizer

SIZE = len(make_tokenizer())
IDS = torch.arange(8, 24).view(2, 8)
TEXT = dict(
    vocab_size=SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.2,
)  # fmt: skip
IMAGES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
)


def tied():
    return make_llama(SIZE, tie_word_embeddings=True)


def gpt2():
    sizes = dict(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def vision():
    ids = dict(image_token_id=5, boi_token_index=6, eoi_token_index=7, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=TEXT, vision_config=IMAGES, **ids))


def lora(*targets, **options):
    return {"r": 4, "target_modules": list(targets), **options}


FOLDERS = {
    "all weights": (tied, None),
    "lora": (tied, lora("q_proj")),
    "lora on a tied head": (tied, lora("q_proj", "lm_head")),
    "lora on a tied embedding": (tied, lora("embed_tokens")),
    "lora on both": (tied, lora("lm_head", "embed_tokens")),
    "lora on both, kept tied": (tied, lora("q_proj", "embed_tokens", ensure_weight_tying=True)),
    "a trained embedding beside lora": (tied, lora("q_proj", modules_to_save=["embed_tokens"])),
    "a trained head beside lora": (tied, lora("q_proj", modules_to_save=["lm_head"])),
    "trained tokens": (tied, lora("q_proj", trainable_token_indices=[8, 9])),
    "dora": (lambda: make_llama(SIZE), lora("q_proj", "lm_head", use_dora=True)),
    "gpt2": (gpt2, lora("lm_head")),
    "images": (vision, None),
    "images and lora": (vision, lora("q_proj", "lm_head")),
}
"""Models of a folder, and options of LoRA."""


def compiled(model, tokenizer, **options):
    return lit_rlhf.Policy(torch.compile(model, backend="eager"), tokenizer, **options)


def compiled_layers(model, tokenizer):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return lit_rlhf.Policy(model, tokenizer, lora=lora("q_proj"))


def compiled_later(model, tokenizer):
    policy = lit_rlhf.Policy(model, tokenizer, lora=lora("q_proj"))
    policy.model = torch.compile(policy.model, backend="eager")
    return policy


def with_tokens(model, tokenizer):
    tokenizer.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(tokenizer))
    return lit_rlhf.Policy(model, tokenizer, lora=lora("q_proj"))


IN_MEMORY = {
    "all weights": lit_rlhf.Policy,
    "lora": lambda model, tokenizer: lit_rlhf.Policy(model, tokenizer, lora=lora("q_proj", "lm_head")),
    "compiled": compiled,
    "compiled, lora": lambda model, tokenizer: compiled(model, tokenizer, lora=lora("q_proj")),
    "compiled layers": compiled_layers,
    "compiled later": compiled_later,
    "added tokens": with_tokens,
}
"""Policies made in memory."""


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def check_exports(source, root, **options):
    """Train, export in all ways, and compare."""
    module = lit_rlhf.SFT(source, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-2), **options)
    trainer = make_trainer(root, max_steps=3, limit_val_batches=0)
    trainer.fit(module, make_data("SFT"))
    trainer.save_checkpoint(root / "last.ckpt")
    module.export(root / "policy")
    export_checkpoint(root / "last.ckpt", root / "export")
    export_checkpoint(root / "last.ckpt", root / "merged", merge=True)
    expected = logits(module.policy.model)
    for folder in (root / "policy", root / "export", root / "merged"):
        is_adapter = (folder / "adapter_config.json").exists()
        loader = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
        with warnings.catch_warnings(action="ignore"):  # PEFT warns of tied weights
            exported = loader.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(logits(exported), expected, atol=2e-5, rtol=0)
        assert not any("_orig_mod" in name for file in folder.glob("*.safetensors") for name in load_file(file))
        again = lit_rlhf.Policy.from_pretrained(folder)
        torch.testing.assert_close(logits(again.model), expected, atol=2e-5, rtol=0)
    return module


@pytest.mark.parametrize("case", FOLDERS)
def test_a_policy_of_a_folder(case, tmp_path):
    make, adapter = FOLDERS[case]
    torch.manual_seed(0)
    model, tokenizer = make(), make_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"do_resize": true}')
    module = check_exports(str(tmp_path / "base"), tmp_path, lora=adapter)
    assert (logits(module.policy.model) - logits(model)).abs().max() > 0.1
    for name in ("policy", "export", "merged"):  # a model of text has no processor
        assert (tmp_path / name / "preprocessor_config.json").exists() == case.startswith("images")
    assert (tmp_path / "policy" / "adapter_config.json").exists() == (adapter is not None)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "compiled layers" else []) for case in IN_MEMORY]
)
def test_a_policy_in_memory(case, tmp_path):
    check_exports(IN_MEMORY[case](tied(), make_tokenizer()), tmp_path)


def test_an_adapter_with_added_tokens_is_trained_on(tmp_path):
    """Its base model has fewer tokens than the adapter's embedding and tokenizer."""
    tokenizer = make_tokenizer()
    for part in (make_llama(SIZE), tokenizer):
        part.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<think>"])
    loaded.resize_token_embeddings(len(tokenizer))
    adapter = lora("q_proj", modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False)
    first = lit_rlhf.Policy(loaded, tokenizer, lora=adapter)
    first.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    again = lit_rlhf.Policy.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(again.model), logits(first.model))
    check_exports(str(tmp_path / "adapter"), tmp_path)


def test_a_merged_export_ends_its_turns(tmp_path):
    """Its generation config is the policy's, which ends at the end of a turn, too."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<|system|>")
    for part in (tied(), tokenizer):
        part.save_pretrained(tmp_path / "base")
    module = check_exports(str(tmp_path / "base"), tmp_path, lora=lora("q_proj"))
    expected = module.policy.causal_lm.generation_config.eos_token_id
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == expected
