"""The calculator against bytes that are really held, on a tiny model."""

import importlib.util
import json

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

import lit_rlhf
from lit_rlhf.cli import main
from lit_rlhf.memory.estimate import Calculator, Setting, model_sizes
from lit_rlhf.memory.models import Builder
from lit_rlhf.memory.passes import Lengthened, Passes, Shape
from lit_rlhf.memory.rehearsal import size
from lit_rlhf.models.decoders import CachedDecoder
from lit_rlhf.models.forward import eval_mode
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.scalar import Critic

LORA = {"r": 4, "target_modules": "all-linear"}
SHAPE = Shape(3, 2, 9, 12)


def make(lora, **options):
    sampling = lit_rlhf.Sampling(max_new_tokens=SHAPE.completion_tokens)
    rewards = [lit_rlhf.rewards.Length(maximum=9)]
    return lit_rlhf.RLOO("testbed", rewards, num_samples=SHAPE.samples, lora=lora, sampling=sampling, **options)


@pytest.mark.parametrize("lora", [None, LORA])
def test_weights_gradients_and_optimizer_state_are_exact(lora):
    policy = Policy.from_pretrained("testbed", lora)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    held = size((*policy.parameters(), *policy.buffers()))
    copied = 0 if lora else held
    found = Calculator(make(lora), SHAPE, Setting(accumulate=2)).estimate()
    assert found.always["policy's weights"] == held
    assert found.always.get("reference", 0) == copied
    assert found.always["optimizer state"] == size(state)
    assert found.update["gradients"] == size(trained)


@pytest.mark.parametrize("lora", [None, LORA])
def test_activations_are_the_saved_tensors(lora):
    algorithm = make(lora)
    kept = Passes(algorithm, Builder(algorithm).build(), None, True).training(SHAPE, accumulated=False).kept
    real, saved = make(lora), WeakIdKeyDictionary()
    real.policy = Policy.from_pretrained("testbed", lora)
    real.policy.probe()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*real.policy.parameters(), *real.policy.buffers())}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = real.policy.logprobs(SHAPE.batch(), SHAPE.completions())
    assert kept == pytest.approx(sum(saved.values()), rel=0.15)
    assert logprobs.requires_grad


def test_cache_is_that_of_the_last_token():
    policy, shape = Policy.from_pretrained("testbed"), Shape(2, 2, 5, 70)
    policy.probe()
    with torch.no_grad(), eval_mode(policy.model):
        grown, jumped = (CachedDecoder(policy.model_forward, shape.batch(), shape.samples) for _ in range(2))
        grown.start(), jumped.start()
        for _ in range(shape.completion_tokens - 1):
            grown.step(torch.zeros(4, dtype=torch.long))
        Lengthened(jumped, shape.prompt_tokens, shape.completion_tokens).start()
    sizes = [size(t for layer in decoder.cache.layers for t in layer.store) for decoder in (grown, jumped)]
    assert sizes[0] == sizes[1]


def test_shards_are_a_part_and_buckets_are_added():
    one, ddp, sharded = (
        Calculator(make(None), SHAPE, Setting(devices=n, strategy=name)).estimate()
        for n, name in ((1, "single"), (2, "ddp"), (2, "fsdp2"))
    )
    assert sharded.always["policy's weights"] == one.always["policy's weights"] / 2
    assert ddp.always["DDP's buckets of gradients"] == one.update["gradients"]
    assert sharded.sampling["gathered weights"] == one.always["policy's weights"]


def test_command_needs_only_a_configuration(tmp_path, capsys):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 99, "hidden_size": 32}
    config |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = ["memory", "--config", "dpo", "--model.policy", str(tmp_path), "--trainer.strategy", "fsdp2"]
    main([*args, "--trainer.devices", "8", "--trainer.accelerator", "gpu", "--device_memory", "80"])
    printed = capsys.readouterr().out
    assert "each of 8 devices" in printed and "fits 80 GiB" in printed
    main([*args, "--trainer.devices", "0,1", "--trainer.accelerator", "gpu"])
    assert "each of 2 devices" in capsys.readouterr().out
    main([*args, "--device_memory", "0.001"])
    assert "does not fit 0.001 GiB" in capsys.readouterr().out


def test_what_a_run_refuses_is_refused(tmp_path, capsys):
    Critic.from_pretrained("testbed").classifier.save_pretrained(tmp_path)
    args = ["memory", "--config", "rloo", "--model.policy", "testbed", "--prompt_tokens", "9"]
    options = f"{{model: {tmp_path}, tokenizer: testbed, offload: true}}"
    judge = f"[{{class_path: lit_rlhf.RewardModel, init_args: {options}}}]"
    with pytest.raises(SystemExit) as exit_info:
        main([*args, "--model.rewards", judge, "--trainer.strategy", "fsdp2"])
    assert "offload of a reward model can't be combined" in f"{exit_info.value}{capsys.readouterr().err}"


def test_unknown_length_and_strategy_are_one_sentence(capsys):
    args = ["memory", "--config", "sft", "--model.policy", "testbed", "--data.max_prompt_tokens", "null"]
    for more, message in (
        ([], "the longest prompt is not known: give --prompt_tokens N, or --data.max_prompt_tokens N"),
        (["--prompt_tokens", "9", "--trainer.strategy", "fsdp"], "--trainer.strategy 'fsdp': the memory of"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main([*args, *more])
        assert message in f"{exit_info.value}{capsys.readouterr().err}"


def test_no_reference_and_another_one():
    without, own, other, copied = (
        model_sizes(Calculator(algorithm, SHAPE, Setting()).passes.models)
        for algorithm in (
            make(LORA, kl_coef=0, reference=None),
            make(LORA),
            make(LORA, reference="testbed"),
            make(None),
        )
    )
    assert without == own
    assert "reference" not in own
    assert other["reference"] == copied["reference"] == copied["policy's weights"]


def test_gradient_checkpointing_leaves_fewer_activations():
    shape = Shape(8, 4, 9, 40)
    plain, checkpointed = (
        Calculator(lit_rlhf.SFT("testbed", gradient_checkpointing=checkpointing), shape, Setting()).passes.training(
            shape, accumulated=False
        )
        for checkpointing in (False, True)
    )
    assert checkpointed.kept < 0.5 * plain.kept
    assert checkpointed.most < plain.most


def test_only_layers_are_gathered_in_16_bits():
    setting = Setting(devices=2, strategy="fsdp2", precision="bf16-mixed")
    found = Calculator(make(None), SHAPE, setting).estimate()
    policy = Policy.from_pretrained("testbed")
    layers = sum(size(layer.parameters()) for layer in policy.causal_lm.model.layers)
    whole = size((*policy.parameters(), *policy.buffers()))
    assert found.sampling["gathered weights"] == whole - layers // 2


def test_offloaded_models_are_held_while_they_are_used(tmp_path):
    def estimate(on_cpu=False, judge=False, **options):
        folder = tmp_path / "judge"
        Critic.from_pretrained("testbed").classifier.save_pretrained(folder)
        rewards = [lit_rlhf.RewardModel(str(folder), tokenizer="testbed", batch_size=2, offload=judge)]
        sampling = lit_rlhf.Sampling(max_new_tokens=SHAPE.completion_tokens)
        algorithm = lit_rlhf.PPO("testbed", rewards, num_samples=2, sampling=sampling, **options)
        return Calculator(algorithm, SHAPE, Setting(on_cpu=on_cpu)).estimate()

    plain = estimate()
    weights, state = plain.always["critic's weights"], plain.always["optimizer state"]
    choices = {"offload_reference": True, "offload_critic": True, "judge": True}
    moved = estimate(**choices)
    assert sum(plain.always.values()) - sum(moved.always.values()) == pytest.approx(3 * weights + state / 2, rel=0.01)
    assert "reference" not in moved.always and "reward models" not in moved.always
    assert plain.update_peak - moved.update_peak == plain.always["reference"] + plain.always["reward models"]
    assert moved.sampling_peak < plain.sampling_peak
    assert estimate(on_cpu=True, **choices) == estimate(on_cpu=True)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
    ids=["4 bit", "4 bit, quantized scales", "8 bit"],
)
def test_quantized_weights_have_the_bytes_of_bitsandbytes(options, wide):
    load = {"quantization_config": options}
    policy = Policy.from_pretrained(str(wide), LORA, **load)
    real = 0
    for parameter in policy.parameters():
        state = getattr(parameter, "quant_state", None)
        scales = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
        scales += [parameter.SCB] if getattr(parameter, "SCB", None) is not None else []
        real += parameter.nbytes + sum(scale.nbytes for scale in scales)
    real += sum(buffer.nbytes for buffer in policy.buffers())
    algorithm = lit_rlhf.RLOO(str(wide), [lit_rlhf.rewards.Length(maximum=9)], lora=LORA, load=load)
    found = Calculator(algorithm, SHAPE, Setting()).estimate()
    assert found.always["policy's weights"] == real
    plain = lit_rlhf.RLOO(str(wide), [lit_rlhf.rewards.Length(maximum=9)], lora=LORA)
    assert real < 0.8 * Calculator(plain, SHAPE, Setting()).estimate().always["policy's weights"]
    assert found.update["a dequantized layer"] > 0 and found.always.get("reference") is None


@pytest.mark.parametrize("name", ["Adagrad", "SGD", "AdamW8bit"])
def test_the_state_of_other_optimizers_is_exact(name):
    source = torch.optim
    if name == "AdamW8bit":
        source = pytest.importorskip("bitsandbytes").optim
    policy, make_optimizer = Policy.from_pretrained("testbed"), lambda params: getattr(source, name)(params, lr=1e-3)
    optimizer = make_optimizer(policy.parameters())
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tables = {"qmap1", "qmap2"}  # one for all weights
    state = [v for of_one in optimizer.state.values() for n, v in of_one.items() if n not in tables]
    found = Calculator(make(None, optimizer=make_optimizer), SHAPE, Setting()).estimate()
    assert found.always.get("optimizer state", 0) == size(v for v in state if isinstance(v, torch.Tensor))
