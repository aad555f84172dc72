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
    adapted = get_peft_model(make_llama(200), LoraConfig(r=2, init_lora_weights=False))
    assert fingerprint(adapted) == before != fingerprint(adapted, adapters=True)
    assert fingerprint(adapted.merge_and_unload()) != before
    repeated = get_peft_model(make_llama(200), LoraConfig(r=2, layer_replication=[[0, 2], [1, 2]]))
    assert fingerprint(repeated) == before
