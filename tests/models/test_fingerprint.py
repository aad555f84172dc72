import pytest
import torch
from peft import LoraConfig, get_peft_model

from lit_rlhf.models.fingerprint import fingerprint
from tiny import make_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_change_of_any_weight_changes_it(dtype):
    model = make_llama(200).to(dtype)
    before = fingerprint(model)
    assert fingerprint(make_llama(200).to(dtype)) == before
    for name, weight in model.named_parameters():
        value = weight.data.view(-1)[-1].clone()
        weight.data.view(-1)[-1] += 0.125
        assert fingerprint(model) != before, name
        weight.data.view(-1)[-1] = value
    assert fingerprint(model) == before


def test_an_adapter_its_merge_and_repeated_layers():
    before = fingerprint(make_llama(200))
    kept = ["norm", "lm_head"]
    adapted = get_peft_model(make_llama(200), LoraConfig(r=2, init_lora_weights=False, modules_to_save=kept), "mine")
    assert fingerprint(adapted, skip=["mine"]) == before != fingerprint(adapted)
    assert fingerprint(adapted.merge_and_unload()) != before
    repeated = get_peft_model(make_llama(200), LoraConfig(r=2, layer_replication=[[0, 2], [1, 2]]))
    assert fingerprint(repeated, skip=["default"]) == before


def test_a_buffer_that_is_saved_counts():
    model = make_llama(200)
    before = fingerprint(model)
    model.register_buffer("bias_of_experts", torch.zeros(3))
    assert fingerprint(model) != before
