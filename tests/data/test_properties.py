"""Properties of readers, messages, collators and masks, over inputs that hypothesis makes up."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_rlhf.data import load_rows, read_preference, read_prompt
from lit_rlhf.data.collate import collate_demonstrations, collate_preferences, collate_prompts, pad
from lit_rlhf.data.encoding import Encoded
from lit_rlhf.data.formats import Example
from lit_rlhf.types import Completions

once = settings(
    database=None, deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck)
)  # fmt: skip

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=8)


def arrays(lists):
    return tuple(np.asarray(row, dtype=np.int32) for row in lists)


def encoded(prompts, completions):
    return [
        Encoded(i, Example("", columns={"n": i}), *arrays([prompt]), arrays(answers))
        for i, (prompt, answers) in enumerate(zip(prompts, completions, strict=True))
    ]


@once
@given(rows=st.lists(ids, min_size=1, max_size=6), pad_id=st.integers(0, 9), side=st.sampled_from(["left", "right"]))
def test_padding_keeps_every_id_on_its_side_and_masks_the_rest(rows, pad_id, side):
    tokens, mask = pad(arrays(rows), pad_id, side)
    assert tokens.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)] == rows
    assert (tokens[~mask] == pad_id).all() and mask.sum(1).tolist() == list(map(len, rows))
    steps = mask.int().diff(dim=1)
    assert (steps >= 0).all() if side == "left" else (steps <= 0).all()


@once
@given(rows=st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=5))
def test_collated_rows_have_the_ids_of_each_prompt_and_completion(rows):
    pairs = collate_preferences(encoded([row[0] for row in rows], [row[1:] for row in rows]), 0)
    assert pairs.tokens.shape[:2] == (len(rows), 2) and pairs.prompts.columns == {"n": list(range(len(rows)))}
    for i, (prompt, *answers) in enumerate(rows):
        assert pairs.prompts.tokens[i][pairs.prompts.mask[i]].tolist() == prompt
        assert [row[keep].tolist() for row, keep in zip(pairs.tokens[i], pairs.mask[i], strict=True)] == answers
    single = collate_demonstrations(encoded([row[0] for row in rows], [row[1:2] for row in rows]), 0)
    assert single.tokens[:, 0][single.mask[:, 0]].tolist() == [i for row in rows for i in row[1]]


@once
@given(rows=st.lists(ids.filter(len), min_size=2, max_size=5), start=st.integers(0, 3))
def test_part_of_a_batch_is_trimmed_to_its_own_collation(rows, start):
    batch = collate_prompts(encoded(rows, [[]] * len(rows)), 7)
    part = batch.rows(slice(start % len(rows), None)).trim()
    alone = collate_prompts(encoded(rows, [[]] * len(rows))[start % len(rows) :], 7)
    assert torch.equal(part.tokens, alone.tokens) and torch.equal(part.mask, alone.mask)
    assert part.index.tolist() == alone.index.tolist() and part.columns == alone.columns


@once
@given(rows=st.lists(st.tuples(ids, ids), min_size=1, max_size=4))
def test_ids_and_lengths_of_completions_come_from_the_mask(rows):
    flat = [row for pair in rows for row in pair]
    tokens, mask = (x.reshape(len(rows), 2, -1) for x in pad(arrays(flat), 0, "right"))
    completions = Completions(tokens, mask, torch.zeros(tokens.shape), torch.ones(len(rows), 2, dtype=torch.bool))
    assert completions.ids() == flat and completions.lengths.flatten().tolist() == list(map(len, flat))


@once
@given(rows=st.lists(st.dictionaries(texts, values, min_size=1, max_size=4), min_size=1, max_size=4))
@pytest.mark.parametrize("indent", [None, 1])
def test_json_rows_are_read_as_written(tmp_path, rows, indent):
    path = tmp_path / "rows.json"
    text = json.dumps(rows, indent=indent) if indent else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, encoding="utf-8", newline="")
    assert repr(load_rows(str(path))) == repr(rows)


@once
@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_csv_rows_are_read_as_written(tmp_path, rows):
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    (tmp_path / "rows.csv").write_text(text.getvalue(), encoding="utf-8", newline="")
    assert load_rows(str(tmp_path / "rows.csv")) == [{"a": a or None, "b": b or None} for a, b in rows]


@once
@given(prompt=texts, chosen=texts, rejected=texts)
def test_a_common_prefix_and_its_completions_make_the_texts_again(prompt, chosen, rejected):
    pair = [f"x{prompt}{chosen}", f"x{prompt}{rejected}"]
    example = read_preference(dict(zip(("chosen", "rejected"), pair, strict=True)))
    assert [example.prompt + completion for completion in example.completions] == pair


def has_null(value):
    if isinstance(value, dict):
        return any(item is None or has_null(item) for item in value.values())
    return isinstance(value, list) and any(map(has_null, value))


def strip(value):
    """Return a value as the JSON without its null fields."""
    text = json.dumps(value)
    return json.loads(text, object_hook=lambda item: {k: v for k, v in item.items() if v is not None})


@once
@given(extra=st.dictionaries(texts, values, max_size=4))
def test_messages_lose_exactly_their_null_fields(extra):
    message = {"role": "user", "content": "a", "extra": extra, "last": None}
    (read,) = read_prompt({"prompt": [message]}).prompt
    assert not has_null(read) and read == strip(message)
