"""Error messages for wrong input from Python: each names the wrong value."""

import math

import jaxtyping
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lit_rlhf
from enumerable import make_prompts
from lit_rlhf.errors import InputError
from lit_rlhf.tokenization import encode_prompt
from lit_rlhf.training.optimization import check_step_size
from runs import make_data, make_module, make_trainer, vowels
from tiny import make_llama, make_tokenizer


@pytest.fixture(autouse=True)
def no_type_checks(monkeypatch):
    """Disable jaxtyping, which users don't have and which would reject misspelt options first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def write_policy(folder, tokens=(), **config):
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer), **config).save_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("tiny"))


# Options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("RLOO", {"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1.0 must be 0 or more"),
        ("Reinforce", {"baseline": "nnone"}, "baseline='nnone' must be one of none, mean, exponential"),
        ("Reinforce", {"baseline_decay": 1.0}, "baseline_decay=1.0 must be at least 0 and below 1"),
        ("RLOO", {"kl_coef": math.nan}, "kl_coef=nan must be a number of 0 or more"),
        ("RLOO", {"kl_coef": math.inf}, "kl_coef=inf must be"),
        ("RLOO", {"kl_coef": -1}, "kl_coef=-1 must be a number of 0 or more"),
        ("RLOO", {"num_samples": 1}, "num_samples=1 must be at least 2"),
        ("Reinforce", {"num_samples": 0}, "num_samples=0 must be at least 1"),
        ("RLOO", {"num_minibatches": 0}, "num_minibatches=0 must be at least 1"),
        ("RLOO", {"sample_minibatches": 4}, "sample_minibatches=4 is more than num_samples=3"),
        ("RLOO", {"rewards": []}, "rewards is empty"),
        ("RLOO", {"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ("RLOO", {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ],
    ids=str,
)
def test_option_out_of_range_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(name, "nowhere", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 4}, r"max_new_tokens is an option of sampling: give sampling=lit_rlhf.Sampling\(max_new"),
        ({"update_epochs": 4}, r"update_epochs is an option of updates: give updates=lit_rlhf.Updates"),
        ({"evaluation": {"best_of": 4}}, r"evaluation=\{'best_of': 4\} must be a lit_rlhf.EvaluationOptions"),
    ],
    ids=str,
)
def test_option_outside_its_group_is_refused(options, message):
    with pytest.raises(TypeError, match=message):
        lit_rlhf.RLOO("nowhere", rewards=[vowels], **options)


@pytest.mark.parametrize("name", ["RLOO", "Reinforce", "SFT"])
@pytest.mark.parametrize("options", [{"lora": {"r": 2}}, {"lora": {}}, {"load": {"dtype": "bfloat16"}}], ids=str)
def test_lora_and_load_are_refused_for_a_policy_in_memory(name, options):
    tokenizer = make_tokenizer()
    policy = lit_rlhf.Policy(make_llama(len(tokenizer)), tokenizer)
    arguments = {"rewards": [vowels]} if name != "SFT" else {}
    with pytest.raises(ValueError, match=r"`lora` and `load` are for a policy loaded here.*lit_rlhf.Policy"):
        getattr(lit_rlhf, name)(policy, **arguments, **options)


@pytest.mark.parametrize("option", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
def test_adapter_that_would_change_the_reference_is_refused(option):
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="changes the model under the adapter, which is the reference"):
        lit_rlhf.Policy(make_llama(len(tokenizer)), tokenizer, lora={"r": 2, **option})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_learning_rate_too_small_for_weights_in_16_bits_is_refused(dtype):
    """Even if half of the trained weights, the zeros of a new adapter, can change."""
    policy = lit_rlhf.Policy(make_llama(263, initializer_range=1.0).to(dtype), make_tokenizer(), lora={"r": 2})
    policy.to(dtype)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-7)
    with pytest.raises(ValueError, match=r"too small to change them .*bf16-mixed, or train `lora`$"):
        check_step_size(optimizer)
    with pytest.raises(ValueError, match=r"too small to change them .*bf16-mixed$"):
        check_step_size(optimizer, has_adapter=True)


# Policies


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_reward_model_from_an_adapter_is_refused(stage, folder, tmp_path, monkeypatch):
    lit_rlhf.Policy.from_pretrained(folder, lora={"r": 2}).save(tmp_path / "adapter")
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    module = make_module("RewardModeling", tmp_path / "adapter")
    data = make_data("RewardModeling")
    with pytest.raises(ValueError, match=r"adapter' is an adapter.*merge it first.*--merge true"):
        getattr(make_trainer(tmp_path, max_steps=1), stage)(module, datamodule=data)


@pytest.mark.parametrize("name", ["RewardModeling", "SFT"])
def test_tokenizer_with_more_tokens_than_the_model_is_refused(name, tmp_path):
    rows = len(make_tokenizer())
    more = write_policy(tmp_path / "more", tokens=["<one>", "<two>"])
    with pytest.raises(ValueError, match=rf"more' has {rows + 2} tokens, but the model embeds {rows}"):
        make_trainer(tmp_path, max_steps=1).fit(make_module(name, more), make_data(name))


def make_prompt_data(length: int, **options):
    """Return short prompts, and one validation prompt of `length` tokens."""
    rows = [{"prompt": text} for text in "abcd"]
    return lit_rlhf.PromptData(train=rows, val=[*rows, {"prompt": "x" * length}], batch_size=2, **options)


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_prompt_and_max_new_tokens_beyond_the_positions_are_refused(stage, tmp_path):
    short = write_policy(tmp_path / "short", max_position_embeddings=32)

    def run(data):
        module = make_module("RLOO", short, max_new_tokens=12)
        getattr(make_trainer(tmp_path, max_steps=1), stage)(module, datamodule=data)

    message = "a prompt of 21 tokens and max_new_tokens=12 exceed the 32 positions .* data.max_prompt_tokens=20"
    with pytest.raises(ValueError, match=message):
        run(make_prompt_data(21))
    run(make_prompt_data(20))
    run(make_prompt_data(21, max_prompt_tokens=20, truncation="truncate"))  # as the message recommends


# Data


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
@pytest.mark.parametrize("options", [{"num_minibatches": 2}, {"sample_minibatches": 2}, {"update_epochs": 2}], ids=str)
def test_dataloader_without_repeats_is_refused_for_several_steps_per_rollout(options, folder, tmp_path):
    batch = make_prompts([9, 10, 11], [12, 13]).replace(text=["one", "two"])
    module = make_module("RLOO", folder, **options)
    with pytest.raises(ValueError, match=r"a rollout lasts 2 training steps.*lit_rlhf.PromptData"):
        make_trainer(tmp_path, max_steps=2).fit(module, DataLoader([batch] * 2, batch_size=None))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", "[]"),
        ("list.json", " [ ]\n"),
        ("header.csv", "prompt,answer\n"),
        ("blank.jsonl", "\n"),
        ("blank.jsonl", "\n  \n\n"),
        ("nothing.jsonl", ""),
        ("nothing.json", ""),
    ],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_file_without_rows_is_refused(part, name, content, tmp_path):
    (tmp_path / name).write_text(content)
    data = lit_rlhf.PromptData(**{"train": [{"prompt": "a"}], part: str(tmp_path / name)}, batch_size=1)
    data.tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=rf"{name}' is empty: give a data set with at least one row"):
        data.setup()


@pytest.mark.parametrize(
    ("name", "data"), [("DPO", "RLOO"), ("RLOO", "DPO"), ("SFT", "DPO"), ("RewardModeling", "SFT")]
)
def test_data_module_of_another_algorithm_is_refused(name, data, folder, tmp_path):
    with pytest.raises(ValueError, match=f"{name} learns from .* give --data [A-Z][a-z]+Data"):
        make_trainer(tmp_path, max_steps=1).fit(make_module(name, folder), make_data(data))


@pytest.mark.parametrize("name", ["DPO", "SFT", "RewardModeling"])
def test_row_longer_than_the_positions_is_refused(name, tmp_path):
    folder = write_policy(tmp_path / "short", max_position_embeddings=8)
    with pytest.raises(ValueError, match=r"a row of \d+ tokens exceeds the 8 positions of the"):
        make_trainer(tmp_path, max_steps=1).fit(make_module(name, folder), make_data(name))


def test_a_pair_of_the_longest_prompt_and_the_longest_completion_must_fit(tmp_path):
    rows = [{"prompt": "x" * 20, "completion": "b", "label": 1}, {"prompt": "a", "completion": "y" * 20, "label": 0}]
    folder, data = write_policy(tmp_path, max_position_embeddings=32), lit_rlhf.DemonstrationData(rows, batch_size=2)
    with pytest.raises(ValueError, match=r"a row of 4\d tokens exceeds the 32 positions"):
        make_trainer(tmp_path, max_steps=1).fit(make_module("KTO", folder), data)


def test_adapter_loaded_frozen_is_refused(folder, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    module = lit_rlhf.RLOO(lit_rlhf.Policy(frozen, make_tokenizer()), rewards=[vowels])
    with pytest.raises(ValueError, match="the policy has no trainable parameter: load its adapter with is_trainable=T"):
        make_trainer(tmp_path, max_steps=1).fit(module, make_data("RLOO"))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_dataloader_made_outside_the_run_is_refused(num_minibatches, folder, tmp_path):
    data, module = make_data("RLOO"), make_module("RLOO", folder, num_minibatches=num_minibatches)
    data.tokenizer = make_tokenizer()
    data.setup()
    with pytest.raises(ValueError, match=r"made outside the run.*trainer.fit\(algorithm, datamodule=data\)"):
        make_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, data.train_dataloader())


def test_gradient_accumulation_scheduler_is_refused_for_rollouts(folder, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[GradientAccumulationScheduler({0: 3})])
    with pytest.raises(ValueError, match=r"GradientAccumulationScheduler .*BatchSchedule"):
        trainer.fit(make_module("PPO", folder, num_minibatches=2), make_data("PPO"))


@pytest.mark.parametrize(
    "change", [lambda terms: terms.mean(), lambda terms: terms.sum(1, keepdim=True), lambda terms: terms[..., None]]
)
def test_loss_terms_of_a_wrong_shape_are_refused(change, folder, tmp_path):
    class WrongShape(lit_rlhf.RLOO):
        def loss(self, rollout):
            terms, metrics = super().loss(rollout)
            return change(terms), metrics

    module = WrongShape(str(folder), rewards=[vowels], num_samples=3, sampling=lit_rlhf.Sampling(max_new_tokens=6))
    with pytest.raises(
        ValueError, match=r"WrongShape.loss must return terms of shape \(4, 3\) or \(4, 3, \d\), one per"
    ):
        make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, make_data("RLOO"))


@pytest.mark.parametrize(
    ("name", "result", "message"),
    [
        ("advantages", lambda rollout: None, r"Wrong.advantages must return numbers of .*, not a NoneType"),
        ("loss", lambda part: part.rewards, r"Wrong.loss must return its terms and a dict of metrics, not \(4, 3\)"),
        ("loss", lambda part: (1.0, {}), r"Wrong.loss must return terms of shape .*, not a float"),
        (
            "loss",
            lambda part: (part.rewards, {"x": (part.rewards[0], part.valid)}),
            r"of one shape, not \(3,\) and",
        ),
        ("loss", lambda part: (part.rewards, {"x": part.rewards}), r"the metric 'x' must be a number, or values and a"),
    ],
)
def test_what_a_method_returns_is_checked(name, result, message, folder, tmp_path):
    wrong = type("Wrong", (lit_rlhf.RLOO,), {name: lambda self, rollout: result(rollout)})
    module = wrong(str(folder), rewards=[vowels], num_samples=3, sampling=lit_rlhf.Sampling(max_new_tokens=6))
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, make_data("RLOO"))


def test_advantages_of_completions_without_a_reward_may_be_nan(folder, tmp_path):
    def some(completions, **kwargs):
        return [None if i % 3 == 0 else float(len(text)) for i, text in enumerate(completions)]

    class NanMean(lit_rlhf.PolicyGradient):
        def advantages(self, rollout):
            returns = rollout.total_returns.masked_fill(~rollout.valid, torch.nan)
            return returns - returns.nanmean(1, keepdim=True)

    module = NanMean(str(folder), rewards=[some], num_samples=3, sampling=lit_rlhf.Sampling(max_new_tokens=6))
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(module, make_data("RLOO"))
    assert trainer.callback_metrics["train/skipped_updates"] == 0


def test_the_type_of_the_data_is_checked_before_they_are_read(folder, tmp_path):
    data = lit_rlhf.PreferenceData(train=[{"prompt": "a", "completion": "b", "label": True}], val=None)
    with pytest.raises(InputError, match="KTO learns from Demonstrations and PreferenceData yields Preferences"):
        make_trainer(tmp_path, max_steps=1).fit(make_module("KTO", folder), data)


def test_empty_prompt_without_bos_and_eos_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"neither BOS nor EOS: set tokenizer.bos_token"):
        encode_prompt(tokenizer, "")
