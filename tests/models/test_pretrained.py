"""Folders of models: loaded whole, without running code in them, or refused with a sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    LlamaForSequenceClassification,
    Qwen2_5_VLConfig,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)

import lit_rlhf
from enumerable import make_prompts
from lit_rlhf.errors import InputError
from lit_rlhf.models.pretrained import load_config, load_tokenizer
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.models.scalar import Critic
from runs import make_data, make_module, make_trainer
from tiny import make_llama, make_tokenizer

SIZE = len(make_tokenizer())
load_policy = lit_rlhf.Policy.from_pretrained
ENCODER = dict(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
SEQ2SEQ = dict(
    vocab_size=SIZE, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, decoder_start_token_id=2,
)  # fmt: skip


def write(folder, model=None):
    (model or make_llama(SIZE)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def change_weights(folder, change, file="model.safetensors"):
    save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})


def change_json(folder, file="config.json", **values):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))


def reward_model(tied=False):
    config = make_llama(SIZE, tie_word_embeddings=tied).config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


def load_reward(folder, **options):
    reward = lit_rlhf.RewardModel(folder, **options)
    reward.setup("cpu")
    return reward


# Weights


def prefixed(prefix):
    return lambda folder: change_weights(folder, lambda weights: {prefix + n: w for n, w in weights.items()})


def lose_a_shard(folder):
    make_llama(SIZE).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BROKEN = {
    "of torch.compile": (prefixed("_orig_mod."), "lacks 21 of the weights .*'lm_head.weight'.*prefix '_orig_mod.'"),
    "of DDP": (prefixed("module."), "which would be random: its file has them with the prefix 'module.'"),
    "empty": (lambda f: change_weights(f, lambda w: {}), "lacks 21 of the weights of a LlamaForCausalLM"),
    "half": (
        lambda f: change_weights(f, lambda w: {n: v for n, v in w.items() if "layers.1" not in n}),
        "lacks 9 of the weights .*'model.layers.1.input_layernorm.weight', .* give a folder that holds a whole model",
    ),
    "a missing shard": (lose_a_shard, "No such file or directory: .*model-0000"),
    "another size": (lambda f: change_json(f, intermediate_size=96), r"is \[32, 64\] and must be \[32, 96\]"),
    "truncated": (truncate, "its file of weights is damaged"),
    "pickled": (pickle_weights, "no weights in safetensors format; pickled ones, .* use_safetensors: false"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights in safetensors format"),
    "scales of a quantized layer": (
        lambda f: change_weights(f, lambda w: {**w, "model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}),
        "would ignore, such as 'model.layers.0.mlp.up_proj.weight_scale'",
    ),
    "a bias that the configuration switches off": (
        lambda f: change_weights(f, lambda w: {**w, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        "would ignore, such as 'model.layers.0.self_attn.q_proj.bias'",
    ),
    "fewer layers than the file": (
        lambda f: change_json(f, num_hidden_layers=1),
        "would ignore, such as 'model.layers.1.input_layernorm.weight': its config.json is of another model",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json with a known model_type"),
    "a torn config": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
    "an unknown model type": (lambda f: change_json(f, model_type="mirage"), "does not know its model_type 'mirage'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_without_all_its_weights_is_refused(case, tmp_path):
    damage, sentence = BROKEN[case]
    damage(write(tmp_path / "model"))
    with pytest.raises(InputError, match=rf"the policy '.*/model' .*{sentence}"):
        load_policy(tmp_path / "model")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    make_llama(SIZE).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="it has no tokenizer: save one into the folder"):
        load_policy(tmp_path)


@pytest.mark.parametrize("extra", ["score.weight", "mtp.proj.weight", "model.layers.0.self_attn.masked_bias"])
def test_weights_of_parts_that_the_model_lacks_do_no_harm(extra, tmp_path):
    model = make_llama(SIZE)
    change_weights(write(tmp_path, model), lambda weights: {**weights, extra: torch.ones(1, 32)})
    loaded = load_policy(tmp_path).model.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


def test_a_tied_head_is_not_missing(tmp_path):
    assert load_policy(write(tmp_path, make_llama(SIZE, tie_word_embeddings=True))).loaded


def test_a_critic_needs_the_whole_trunk_and_makes_its_head(tmp_path):
    assert Critic.from_pretrained(write(tmp_path / "whole")).classifier.score.weight.abs().max() == 0
    change_weights(write(tmp_path / "half"), lambda w: {n: v for n, v in w.items() if "layers.0" in n})
    with pytest.raises(InputError, match=r"the critic '.*half' lacks 11 of the weights of a LlamaForSeq"):
        Critic.from_pretrained(tmp_path / "half")


def test_pickled_weights_are_read_if_asked_for(tmp_path):
    pickle_weights(write(tmp_path))
    assert torch.equal(
        load_policy(tmp_path, use_safetensors=False).model.lm_head.weight, make_llama(SIZE).lm_head.weight
    )
    assert Critic.from_pretrained(tmp_path, use_safetensors=False).classifier.score.weight.shape == (1, 32)


# Models that are no decoders


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(**T5)), r"is an encoder-decoder \(t5\)"),
        (lambda: BartForConditionalGeneration(BartConfig(**SEQ2SEQ)), r"is an encoder-decoder \(bart\)"),
        (lambda: BertLMHeadModel(BertConfig(**ENCODER)), "BertLMHeadModel that does not generate from left to right"),
        (lambda: RobertaForCausalLM(RobertaConfig(**ENCODER)), "does not generate from left to right"),
        (reward_model, "is a reward model, LlamaForSequenceClassification: give a causal"),
        (lambda: reward_model(tied=True), "is a reward model, LlamaForSequenceClassification: give a causal"),
    ],
    ids=["t5", "bart", "bert", "roberta", "reward model", "tied reward model"],
)
def test_a_policy_that_is_no_causal_language_model_is_refused(model, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        load_policy(write(tmp_path, model()))


def test_a_model_of_another_kind_is_refused_before_the_data_are_encoded(tmp_path):
    write(tmp_path, T5ForConditionalGeneration(T5Config(**T5)))
    for name in ("SFT", "RLOO", "RewardModeling"):
        data = make_data(name)
        with pytest.raises(InputError, match="is an encoder-decoder"):
            make_trainer(tmp_path, max_steps=1).fit(make_module(name, tmp_path), data)
        assert getattr(data, "train_set", None) is None


T5 = dict(vocab_size=SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)


def test_a_bert_that_was_made_a_decoder_samples(tmp_path):
    policy = load_policy(write(tmp_path, BertLMHeadModel(BertConfig(**ENCODER, is_decoder=True))))
    assert policy.sample(make_prompts([5, 6, 7]), 2, Sampling(max_new_tokens=3)).tokens.shape == (1, 2, 3)


def test_a_model_whose_configuration_does_not_say_so_is_found_to_attend_to_the_future():
    sizes = dict(vocab_size=SIZE, emb_dim=32, n_layers=2, n_heads=4, pad_index=0, bos_index=1, eos_index=2)
    policy = lit_rlhf.Policy(XLMWithLMHeadModel(XLMConfig(**sizes)), make_tokenizer())
    with pytest.raises(InputError, match=r"tokens attend to later ones .*give a decoder-only model"):
        policy.probe()


@pytest.mark.parametrize("load", [load_reward, Critic.from_pretrained])
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_encoders_are_refused_as_reward_models_and_critics(kind, load, tmp_path):
    if kind == "bert":
        write(tmp_path, BertForSequenceClassification(BertConfig(**ENCODER, num_labels=1)))
    else:
        write(tmp_path, T5ForConditionalGeneration(T5Config(**T5)))
    with pytest.raises(InputError, match=r"give a decoder-only model"):
        load(tmp_path)


# Options


@pytest.fixture
def cache(tmp_path):
    """A download cache with one policy and one reward model."""
    for name, model in (("acme/tiny", make_llama(SIZE)), ("acme/reward", reward_model())):
        root = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        write(root / "snapshots" / ("a" * 40), model)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("a" * 40)
    return {"cache_dir": str(tmp_path / "cache")}


def test_cache_dir_reaches_every_file_of_every_model(cache, tmp_path):
    module = make_module("PPO", "acme/tiny", critic="acme/reward", load=cache)
    make_trainer(tmp_path, max_steps=1).fit(module, make_data("PPO"))
    rewards = make_module("RewardModeling", "acme/tiny", load=cache)
    make_trainer(tmp_path, max_steps=1).fit(rewards, make_data("RewardModeling"))
    assert load_reward("acme/reward", load=cache)(["a"], ["b"]).shape == (1,)
    assert load_config("acme/tiny", "it", **cache).hidden_size == 32


def test_subfolder_is_that_of_the_policy_and_not_of_the_critic(tmp_path):
    write(tmp_path / "run" / "step-100")
    write(tmp_path / "reward", reward_model())
    options = {"load": {"subfolder": "step-100", "dtype": "bfloat16"}}
    for critic in ("policy", str(tmp_path / "reward")):
        module = make_module("VanillaPG", tmp_path / "run", critic=critic, lora={"r": 2}, **options)
        module.configure_model()
        assert module.critic.config.hidden_size == 32


def test_an_adapter_in_a_subfolder_loads_with_its_base_model(tmp_path):
    base = write(tmp_path / "base")
    load_policy(base, lora={"r": 2, "init_lora_weights": False}).save(tmp_path / "run" / "last")
    ids = torch.arange(8, 24).view(2, 8)
    here, there = (load_policy(tmp_path / "run" / "last"), load_policy(tmp_path / "run", subfolder="last"))
    assert torch.equal(here.model(ids).logits, there.model(ids).logits)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "bf16"}, "dtype='bf16' is no dtype of weights: use float32, bfloat16"),
        ({"torch_dtype": "int8"}, "dtype='int8' is no dtype of weights"),
        ({"flash": True}, "`load` has no option 'flash'"),
        ({"attn_implementation": "quick"}, 'attn_implementation="quick"` is not supported'),
        ({"subfolder": "nowhere"}, "no config.json with a known model_type"),
    ],
    ids=str,
)
def test_a_wrong_option_gets_a_sentence(options, sentence, tiny):
    with pytest.raises(InputError, match=sentence):
        load_policy(tiny, **options)


def test_torch_dtype_is_another_name_of_dtype(tiny):
    assert load_policy(tiny, torch_dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["nobody/nothing", "no such name", "./nowhere"])
def test_a_model_that_is_not_there_gets_a_sentence(name):
    for load in (load_policy, load_tokenizer, Critic.from_pretrained, load_reward):
        with pytest.raises(FileNotFoundError, match="there is no such folder"):
            load(name)


# Code


@pytest.mark.parametrize("load", [load_policy, Critic.from_pretrained, load_reward, load_tokenizer])
def test_code_in_a_folder_is_neither_run_nor_asked_about(load, tmp_path, monkeypatch):
    folder = write(tmp_path / "custom")
    classes = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": [None, "code.T"]}
    change_json(folder, model_type="own", auto_map=classes)
    change_json(folder, "tokenizer_config.json", auto_map=classes, tokenizer_class="OwnTokenizer")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    if load is not load_tokenizer:
        with pytest.raises(InputError, match=r"Python code from its folder, which is not run: .*trust_remote_code"):
            load(folder)
    else:
        try:
            load(folder)
        except InputError as error:
            assert "trust_remote_code" in str(error)
    assert not (tmp_path / "ran").exists()


# Adapters


def rename(folder):
    file = "adapter_model.safetensors"
    change_weights(folder, lambda w: {n.replace("model.layers", "trunk.layers"): v for n, v in w.items()}, file)


def more_layers(folder):
    def change(weights):
        return {**weights, **{name.replace("layers.1", "layers.7"): weight.clone() for name, weight in weights.items()}}

    change_weights(folder, change, "adapter_model.safetensors")


def pickle_adapter(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


BROKEN_ADAPTERS = {
    "other names": (rename, "lacks 8 of the weights .*which would be random: it does not fit its adapter_config"),
    "more layers": (more_layers, "has 4 weights for layers that '.*tiny.*' lacks, such as .*layers.7"),
    "another rank": (lambda f: change_json(f, "adapter_config.json", r=4), "size mismatch"),
    "pickled": (pickle_adapter, "no weights in safetensors format"),
    "a reward model's": (
        lambda f: change_json(f, "adapter_config.json", task_type="SEQ_CLS"),
        "adapter for SEQ_CLS",
    ),
    "no base model": (lambda f: change_json(f, "adapter_config.json", base_model_name_or_path=None), "no base model"),
    "its base model gone": (
        lambda f: change_json(f, "adapter_config.json", base_model_name_or_path="./gone"),
        "'./gone', the base model of the policy '.*', can't be loaded: './gone': there is no such folder",
    ),
    "a module that it lacks": (
        lambda f: change_json(f, "adapter_config.json", modules_to_save=["lm_head"]),
        "'base_model.model.lm_head.weight' is missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(case, tiny, tmp_path):
    damage, sentence = BROKEN_ADAPTERS[case]
    load_policy(tiny, lora={"r": 2}).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=sentence):
        load_policy(tmp_path)


def test_a_pickled_adapter_is_read_if_asked_for(tiny, tmp_path):
    policy = load_policy(tiny, lora={"r": 2, "init_lora_weights": False})
    policy.save(tmp_path)
    pickle_adapter(tmp_path)
    ids = torch.arange(8, 24).view(2, 8)
    assert torch.equal(load_policy(tmp_path, use_safetensors=False).model(ids).logits, policy.model(ids).logits)


def test_the_base_model_of_an_adapter_is_checked_too(tmp_path):
    load_policy(write(tmp_path / "base"), lora={"r": 2}).save(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    write(tmp_path / "base", T5ForConditionalGeneration(T5Config(**T5)))
    with pytest.raises(InputError, match=r"base', the base model of the policy '.*adapter', is an encoder-decoder"):
        load_policy(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        (
            {"target_modules": ["query"]},
            "{'query'} not found.*target_modules can be down_proj, gate_proj, k_proj",
        ),
        ({"r": 0}, "`r` should be a positive integer"),
        ({"r": "8"}, "lora: no adapter"),
        ({"task_type": "nope"}, "Invalid task type: 'nope'"),
        ({"layers_to_transform": [9]}, "lora: no adapter"),
    ],
    ids=str,
)
def test_wrong_options_of_lora_get_a_sentence(lora, sentence, tiny):
    with pytest.raises(InputError, match=sentence):
        load_policy(tiny, lora=lora)


def test_a_vision_model_that_is_no_language_model_is_refused_with_what_to_give(tmp_path):
    Qwen2_5_VLConfig().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a Qwen2_5_VLConfig: give a decoder-only .* model"):
        load_policy(str(tmp_path))
