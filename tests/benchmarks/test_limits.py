"""Count the weights that a token is multiplied by, in models of several families."""

import pytest
import torch
from contenders import Settings
from limits import count, multiplied
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS, WIDTH, INNER, VOCABULARY = 2, 32, 48, 64
SIZES = dict(hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=4)
ATTENTION = 4 * WIDTH**2


@pytest.mark.parametrize(
    ("family", "sizes", "of_a_layer"),
    [
        ("llama", SIZES, ATTENTION + 3 * WIDTH * INNER),
        ("llama", {**SIZES, "tie_word_embeddings": True}, ATTENTION + 3 * WIDTH * INNER),
        ("gpt_neox", SIZES, ATTENTION + 2 * WIDTH * INNER),
        ("gpt2", dict(n_embd=WIDTH, n_inner=INNER, n_layer=LAYERS, n_head=4), ATTENTION + 2 * WIDTH * INNER),
        ("opt", dict(SIZES, ffn_dim=INNER, word_embed_proj_dim=WIDTH), ATTENTION + 2 * WIDTH * INNER),
        (
            "mixtral",
            dict(SIZES, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2),
            ATTENTION + 8 * WIDTH + 2 * 3 * WIDTH * INNER,
        ),
    ],
)
def test_weights_per_token(family, sizes, of_a_layer, tmp_path, monkeypatch):
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert multiplied(model) == LAYERS * of_a_layer
    monkeypatch.setattr("limits.measure_machine", lambda settings: (1e9, 1e9))
    config.save_pretrained(tmp_path)
    found = count(Settings(str(tmp_path)))
    assert (found.layers, found.head) == (LAYERS * of_a_layer, VOCABULARY * WIDTH)
    assert found.held_mib == pytest.approx(5 * 4 * sum(p.numel() for p in model.parameters()) / 2**20)
    halved = count(Settings(str(tmp_path), precision="bf16-mixed"))
    assert halved.read == pytest.approx(found.read / 2)
