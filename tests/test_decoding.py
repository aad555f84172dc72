"""Decoding with room for tokens to come: the same logits as with a cache that is copied at every token."""

import torch
from transformers import DynamicCache

from enumerable import make_prompts
from lit_rlhf.decoding import ROOM, CachedDecoder
from lit_rlhf.policy import Policy
from tiny import make_llama, make_tokenizer


def make_decoder(plain: bool = False) -> CachedDecoder:
    policy = Policy(make_llama(263), make_tokenizer())
    policy.model.eval()
    policy.probe()
    decoder = CachedDecoder(policy, make_prompts([9, 8], [7], [6, 5, 4]), 2)
    if plain:
        decoder.cache = DynamicCache(config=policy.causal_lm.config)
    return decoder


@torch.no_grad()
def test_room_changes_nothing_while_rows_leave_and_room_is_made_again():
    roomy, plain = make_decoder(), make_decoder(plain=True)
    logits = roomy.start()
    assert torch.equal(logits, plain.start())
    for step in range(2 * ROOM + 10):
        if step in (1, 20, ROOM + 30):  # before there is room, and after
            rows = torch.arange(1, len(logits))
            roomy.keep(rows), plain.keep(rows)
            logits = logits[rows]
        drawn = logits.argmax(-1)
        logits = roomy.step(drawn)
        assert torch.equal(logits, plain.step(drawn))
    assert len(logits) == 3


@torch.no_grad()
def test_a_step_writes_behind_what_is_held():
    decoder = make_decoder()
    tokens = decoder.start().argmax(-1)

    def places() -> list[int]:
        decoder.step(tokens)
        return [layer.keys.data_ptr() for layer in decoder.cache.layers]

    assert len({tuple(places()) for _ in range(ROOM)}) == 1
