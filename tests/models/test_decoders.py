"""Decoding with a preallocated cache: the same logits as with a cache that is copied at every token."""

import pytest
import torch
from transformers import DynamicCache

from enumerable import make_prompts
from lit_rlhf.models.decoders import CAPACITY_STEP, CachedDecoder
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import remaining_rows
from tiny import make_llama, make_tokenizer


def make_decoder(plain: bool = False) -> CachedDecoder:
    policy = Policy(make_llama(263), make_tokenizer())
    policy.model.eval()
    policy.probe()
    decoder = CachedDecoder(policy.model_forward, make_prompts([9, 8], [7], [6, 5, 4]), 2)
    if plain:
        decoder.cache = DynamicCache(config=policy.causal_lm.config)
    return decoder


@torch.no_grad()
def test_a_preallocated_cache_gives_the_same_logits_while_rows_leave_and_it_grows():
    preallocated, plain = make_decoder(), make_decoder(plain=True)
    logits = preallocated.start()
    assert torch.equal(logits, plain.start())
    for step in range(2 * CAPACITY_STEP + 10):
        if step in (1, 20, CAPACITY_STEP + 30):  # before the first allocation, and after
            rows = torch.arange(1, len(logits))
            preallocated.keep(rows), plain.keep(rows)
            logits = logits[rows]
        drawn = logits.argmax(-1)
        logits = preallocated.step(drawn)
        assert torch.equal(logits, plain.step(drawn))
    assert len(logits) == 3


@pytest.mark.parametrize("ended", [[0], [5], [0, 1, 2], [1, 4], [2, 3, 4, 5], [0, 2, 4]])
def test_the_last_rows_replace_those_that_ended(ended):
    gone = torch.tensor([i in ended for i in range(6)])
    stay = remaining_rows(gone).tolist()
    assert sorted(stay) == [i for i in range(6) if i not in ended]
    assert all(row == place for place, row in enumerate(stay) if place not in ended)  # few are moved


@torch.no_grad()
def test_rows_whose_place_does_not_change_are_not_copied(monkeypatch):
    decoder, others = make_decoder(), make_decoder()
    for one in (decoder, others):
        one.step(one.start().argmax(-1))
    order = torch.tensor([0, 5, 2, 3])
    held = decoder.cache.layers[0].keys.data_ptr()
    decoder.keep(order)
    assert decoder.cache.layers[0].keys.data_ptr() == held
    for ours, theirs in zip(decoder.cache.layers, others.cache.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys[order]) and torch.equal(ours.values, theirs.values[order])


@torch.no_grad()
def test_a_step_writes_in_place():
    decoder = make_decoder()
    tokens = decoder.start().argmax(-1)

    def places() -> list[int]:
        decoder.step(tokens)
        return [layer.keys.data_ptr() for layer in decoder.cache.layers]

    assert len({tuple(places()) for _ in range(CAPACITY_STEP)}) == 1
