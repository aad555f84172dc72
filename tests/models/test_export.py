"""Exported folders and predicted rows give the same scores and logits as the trained module."""

import errno
import json
import os

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lit_rlhf
from lit_rlhf.models import export
from lit_rlhf.models.export import export_checkpoint, write_folder
from runs import make_data, make_module, make_trainer, vowels
from tiny import make_llama, make_tokenizer

LORA = {"r": 2, "init_lora_weights": False}
IDS = torch.arange(8, 24).view(2, 8)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def base(request, tmp_path_factory):
    """A folder with weights in float32 or in bfloat16."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).to(getattr(torch, request.param)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(name, source, root, **options):
    """Return a module after one update, and its checkpoint."""
    trainer = make_trainer(root, max_steps=1, limit_val_batches=0)
    module = source if isinstance(source, lit_rlhf.Algorithm) else make_module(name, source, **options)
    trainer.fit(module, make_data(name))
    trainer.save_checkpoint(root / "last.ckpt")
    return module, root / "last.ckpt"


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def files(folder):
    return {path.name for path in folder.iterdir()}


# Reward models


def some_pairs(module):
    data = make_data("RewardModeling")
    data.tokenizer = module.tokenizer
    data.setup()
    return next(iter(data.train_dataloader()))


def scores_in_use(folder, batch):
    reward = lit_rlhf.RewardModel(folder)
    numbers = batch.prompts.index.tolist()
    answers = ([f"good {i}" for i in numbers], [f"bad {-i}" for i in numbers])
    return torch.stack([reward(batch.prompts.text, completions) for completions in answers], 1)


@pytest.mark.parametrize("how", ["save_model", "export_checkpoint"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "lora"])
def test_an_exported_reward_model_scores_as_in_training(lora, how, base, tmp_path):
    module, checkpoint = trained("RewardModeling", base, tmp_path, lora=lora)
    batch = some_pairs(module)
    with torch.no_grad():
        before = module.scores(batch)
    if how == "save_model":
        module.save_model(tmp_path / "model")
    else:
        export_checkpoint(checkpoint, tmp_path / "model", merge=True)
    assert before.std() > 0.01  # different scores, so that a wrong head or adapter is noticed
    torch.testing.assert_close(scores_in_use(tmp_path / "model", batch), before, atol=1e-4, rtol=1e-4)
    assert "adapter_config.json" not in files(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(module.scores(batch), before)  # saving changes nothing


def test_transformers_loads_a_reward_model_with_every_weight(base, tmp_path):
    module, _ = trained("RewardModeling", base, tmp_path, lora=LORA)
    module.save_model(tmp_path / "model")
    _, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


# Policies


def test_under_lora_the_head_of_a_reward_model_is_float32(base, tmp_path):
    """Steps of a typical learning rate would be rounded away in the dtype of the frozen trunk."""
    module, _ = trained("RewardModeling", base, tmp_path, lr=1e-5, lora={"r": 2}, load={"dtype": "bfloat16"})
    learned = [p for p in module.parameters() if p.requires_grad]
    assert {p.dtype for p in learned} == {torch.float32} and {p.dtype for p in module.parameters()} > {torch.float32}
    score = module.reward_model.classifier.score
    moved = score.modules_to_save["default"].weight - score.original_module.weight
    assert 0 < moved.abs().max() < 2e-5


def test_a_partly_frozen_policy_is_exported_with_all_weights(base, tmp_path):
    policy = lit_rlhf.Policy.from_pretrained(base)
    policy.model.get_input_embeddings().weight.requires_grad_(False)
    method = lit_rlhf.SFT(policy, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    module, checkpoint = trained("SFT", method, tmp_path)
    export_checkpoint(checkpoint, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported), logits(module.policy.model))


def test_a_merged_adapter_has_the_dtype_and_the_logits_of_training(base, tmp_path):
    module, checkpoint = trained("RLOO", base, tmp_path, lora=LORA)
    folder = export_checkpoint(checkpoint, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert merged.config.dtype == torch.float32
    torch.testing.assert_close(logits(merged), logits(module.policy.model), atol=1e-5, rtol=1e-5)
    assert not {"adapter_config.json", "base_config"} & files(folder)


def test_an_exported_adapter_loads_on_its_base_model(base, tmp_path):
    module, checkpoint = trained("RLOO", base, tmp_path, lora=LORA)
    folder = export_checkpoint(checkpoint, tmp_path / "adapter")
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(adapted), logits(module.policy.model), atol=1e-5, rtol=1e-5)


def make_policy(folder=None, moved=0.0, **options):
    """A policy in memory, with a new or a loaded model, whose weights may be changed."""
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder) if folder else make_llama(len(tokenizer))
    for parameter in model.parameters():
        parameter.data += moved
    return lit_rlhf.Policy(model, tokenizer, **options)


def write_base(root):
    folder = root / "base"
    make_policy().save(folder)
    return folder


def test_the_adapter_of_a_policy_in_memory_is_always_merged(tmp_path):
    """A model in memory has the name of its folder, but may have changed since it was loaded."""
    policy = make_policy(write_base(tmp_path), moved=0.05, lora=LORA)
    module = lit_rlhf.RLOO(policy, rewards=[vowels], sampling=lit_rlhf.Sampling(max_new_tokens=4))
    _, checkpoint = trained("RLOO", module, tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(export_checkpoint(checkpoint, tmp_path / "model"))
    torch.testing.assert_close(logits(exported), logits(module.policy.model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [[], ["norm"]], ids=str)
def test_an_adapter_is_not_merged_into_a_changed_base_model(kept, tmp_path):
    tokenizer, model = make_tokenizer(), make_llama(len(make_tokenizer()))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    _, checkpoint = trained("RLOO", tmp_path / "base", tmp_path, lora={**LORA, "modules_to_save": kept})
    export_checkpoint(checkpoint, tmp_path / "merged", merge=True)
    model.model.norm.weight.data *= 1.1
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="has changed since the adapter was trained on it"):
        export_checkpoint(checkpoint, tmp_path / "again", merge=True)
    export_checkpoint(checkpoint, tmp_path / "again")


def test_an_export_does_not_replace_a_model_of_somebody_else(base, tmp_path):
    _, checkpoint = trained("SFT", base, tmp_path)
    make_policy().save(tmp_path / "theirs")
    before = (tmp_path / "theirs" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"theirs' holds a model that lit_rlhf has not written: .*--overwrite true"):
        export_checkpoint(checkpoint, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "model.safetensors").read_bytes() == before
    export_checkpoint(checkpoint, tmp_path / "theirs", overwrite=True)
    assert (tmp_path / "theirs" / "model.safetensors").read_bytes() != before


def test_an_export_does_not_replace_what_it_reads(tmp_path):
    folder = write_base(tmp_path)
    _, checkpoint = trained("RLOO", folder, tmp_path, lora=LORA)
    with pytest.raises(ValueError, match=r"base' holds '.*base', which the export needs"):
        export_checkpoint(checkpoint, folder, merge=True, overwrite=True)
    checkpoint = checkpoint.rename(folder / "last.ckpt")
    with pytest.raises(ValueError, match=r"base' holds '.*last.ckpt', which the export needs"):
        export_checkpoint(checkpoint, folder, overwrite=True)
    assert checkpoint.is_file() and (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim", "a/../../victim", "..\\victim", "C:/victim", "", "."])
def test_a_checkpoint_writes_nothing_outside_the_exported_folder(name, tmp_path):
    files_of_export = {"config.json": torch.zeros(3, dtype=torch.uint8), name: torch.zeros(3, dtype=torch.uint8)}
    export = {"prefix": "policy.model.", "source": "", "class": "LlamaForCausalLM", "files": files_of_export}
    torch.save({"export": export, "state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"the checkpoint would write .*, outside of --out"):
        export_checkpoint(tmp_path / "last.ckpt", tmp_path / "out")
    assert files(tmp_path) == {"last.ckpt"}


def test_options_in_a_checkpoint_run_no_code_of_its_base_model(tmp_path):
    """With trust_remote_code, transformers runs custom_generate/generate.py of the folder that it loads."""
    folder = write_base(tmp_path)
    (folder / "custom_generate").mkdir()
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\ndef generate(*args, **kwargs): ...\n"
    (folder / "custom_generate" / "generate.py").write_text(code)
    _, path = trained("RLOO", folder, tmp_path, lora=LORA)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["export"]["load"] |= {"trust_remote_code": True, "use_safetensors": False}
    torch.save(checkpoint, path)
    export_checkpoint(path, tmp_path / "merged", merge=True)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_in_a_checkpoint_is_checked_as_one_in_a_folder(tmp_path):
    _, path = trained("RLOO", write_base(tmp_path), tmp_path, lora=LORA)
    checkpoint = torch.load(path, weights_only=True)
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"}
    content = json.dumps({**config, "prompt_tuning_init_text": "a", "tokenizer_name_or_path": str(tmp_path)}).encode()
    checkpoint["export"]["files"]["adapter_config.json"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"the checkpoint's adapter .* trains prompts, not layers"):
        export_checkpoint(path, tmp_path / "out", merge=True)


def test_weights_of_several_dtypes_are_exported_as_they_are(tmp_path):
    policy = make_policy()
    policy.model.bfloat16().lm_head.float()
    module = lit_rlhf.SFT(policy, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    policy.model.lm_head.register_forward_pre_hook(lambda layer, args: (args[0].float(),))
    module, checkpoint = trained("SFT", module, tmp_path)
    exported = load_file(export_checkpoint(checkpoint, tmp_path / "out") / "model.safetensors")
    weights = module.policy.model.state_dict()
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(weight, weights[name]) for name, weight in exported.items())


def test_an_export_leaves_a_repository_alone_and_knows_the_home_folder(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _, checkpoint = trained("SFT", base, tmp_path)
    assert export_checkpoint(checkpoint, "~/out") == tmp_path / "out"
    (tmp_path / "out" / ".git").mkdir()
    with pytest.raises(ValueError, match=r"out' holds something other than a model \(.git"):
        export_checkpoint(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("kind", ["pipeline", "AutoModelForCausalLM", "logging", "PreTrainedTokenizerFast"])
def test_a_checkpoint_names_a_class_of_models_only(kind, tmp_path):
    export = {"prefix": "policy.model.", "source": "", "class": kind, "files": {}}
    torch.save({"export": export, "state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=f"no class '{kind}'"):
        export_checkpoint(tmp_path / "last.ckpt", tmp_path / "out")


def test_a_damaged_checkpoint_gets_a_sentence(tmp_path):
    for content in (b"", b"rubbish" * 9):
        (tmp_path / "torn.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"torn.ckpt' can't be read: it is damaged, or holds more than data"):
            export_checkpoint(tmp_path / "torn.ckpt", tmp_path / "out")


def test_an_export_replaces_only_a_folder_that_holds_a_model(base, tmp_path):
    _, checkpoint = trained("SFT", base, tmp_path)
    for _ in range(2):
        export_checkpoint(checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds something other than a model \(last.ckpt, out\)"):
        export_checkpoint(checkpoint, tmp_path)
    with pytest.raises(ValueError, match="is a file: give a folder"):
        export_checkpoint(checkpoint, checkpoint)
    assert checkpoint.is_file() and files(tmp_path) == {"last.ckpt", "out"}


def test_an_adapter_folder_without_tokenizer_uses_that_of_its_base_model(base, tmp_path):
    module, _ = trained("RLOO", base, tmp_path, lora=LORA)
    module.policy.model.save_pretrained(tmp_path / "adapter")
    again = make_module("RLOO", tmp_path / "adapter")
    assert again.tokenizer.get_vocab() == module.tokenizer.get_vocab()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_policy_in_memory_is_exported_with_or_without_merge(loaded, tmp_path):
    policy = make_policy(write_base(tmp_path) if loaded else None, moved=0.05)
    module, checkpoint = trained(
        "RLOO", lit_rlhf.RLOO(policy, rewards=[vowels], sampling=lit_rlhf.Sampling(max_new_tokens=4)), tmp_path
    )
    for merge in (False, True):
        folder = export_checkpoint(checkpoint, tmp_path / "policy", merge=merge)
        exported = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        weights = module.policy.model.state_dict()
        assert exported.keys() == weights.keys() and all(torch.equal(w, weights[n]) for n, w in exported.items())


def test_another_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt' holds no model of lit_rlhf"):
        export_checkpoint(tmp_path / "other.ckpt", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"none.ckpt': there is no such file"):
        export_checkpoint(tmp_path / "none.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Rows


def predict(name, base, root):
    module = make_module(name, base)
    data = make_data(name, val=5, eval_batch_size=2)
    rows = [row for batch in make_trainer(root).predict(module, datamodule=data) for row in batch]
    held_out = [row.example for row in data.val_set]
    assert [row["index"] for row in rows] == [row.index for row in data.val_set]
    assert [row["prompt"] for row in rows] == [example.prompt for example in held_out]
    return module, data, rows


def test_prediction_of_sft_writes_completions_and_their_loss(base, tmp_path):
    module, data, rows = predict("SFT", base, tmp_path)
    with torch.no_grad():
        for row, encoded in zip(rows, data.val_set, strict=True):
            (ids,) = encoded.completions
            context = torch.tensor([[*encoded.prompt, *ids]]).long()
            expected = torch.nn.functional.cross_entropy(
                module.policy.model(context).logits[0, len(encoded.prompt) - 1 : -1], context[0, len(encoded.prompt) :]
            )
            assert row["loss"] == pytest.approx(expected.item(), abs=1e-4)
            assert isinstance(row["completion"], str)
            assert isinstance(row["finished"], bool)
    (metrics,) = make_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    tokens = [len(row.completions[0]) for row in data.val_set]
    mean = sum(row["loss"] * count for row, count in zip(rows, tokens, strict=True)) / sum(tokens)
    assert metrics["val/loss"] == pytest.approx(mean, abs=1e-4)


def test_prediction_of_a_reward_model_scores_both_completions(base, tmp_path):
    module, data, rows = predict("RewardModeling", base, tmp_path)
    module.save_model(tmp_path / "model")
    reward = lit_rlhf.RewardModel(tmp_path / "model")
    for row, encoded in zip(rows, data.val_set, strict=True):
        scores = reward([row["prompt"]] * 2, list(encoded.example.completions))
        assert [row["chosen"], row["rejected"]] == pytest.approx(scores.tolist(), abs=1e-4)
    (metrics,) = make_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    right = [row["chosen"] > row["rejected"] for row in rows]
    assert metrics["val/accuracy"] == pytest.approx(sum(right) / len(right))


def test_an_adapter_is_merged_into_the_revision_that_it_was_trained_on(base, tmp_path, monkeypatch):
    _, checkpoint = trained("RLOO", base, tmp_path, lora=LORA, load={"revision": "v2"})
    asked, original = [], type(make_llama(9)).from_pretrained

    def from_pretrained(source, **options):
        asked.append(options.get("revision"))
        return original(source, **options)

    monkeypatch.setattr(type(make_llama(9)), "from_pretrained", staticmethod(from_pretrained))
    export_checkpoint(checkpoint, tmp_path / "merged", merge=True)
    assert asked == ["v2"]


def test_the_error_for_a_model_of_custom_code_names_policy_last(base, tmp_path):
    _, path = trained("RLOO", base, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["export"]["class"] = "MyLlama"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"no class 'MyLlama'.*policy/last"):
        export_checkpoint(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_is_flushed_to_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "policy"
    write_folder(target, lambda folder: (folder / "weights").write_text("old"))
    flushed = []

    def flush(path):
        flushed.append(path.name)
        if path.name == "weights":
            assert (target / "weights").read_text() == "old"
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(export, "flush", flush)
    with pytest.raises(OSError, match="Input/output error"):
        write_folder(target, lambda folder: (folder / "weights").write_text("new"))
    assert flushed and (target / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["policy"]
