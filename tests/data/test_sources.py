"""All sources yield the same rows; unreadable ones raise."""

import json

import datasets
import pytest

from lit_rlhf.data import load_rows

ROWS = [{"prompt": f"Prompt, number {i}\n", "answer": i, "score": i / 4} for i in range(5)]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(folder, kind):
    data = datasets.Dataset.from_list(ROWS)
    path = folder / f"rows.{kind}"
    match kind:
        case "json":
            path.write_text(json.dumps(ROWS))
        case "jsonl":
            path.write_text("\n".join(map(json.dumps, ROWS)))
        case "csv":
            data.to_csv(path)
        case "parquet":
            data.to_parquet(path)
        case "saved":
            data.save_to_disk(path)
        case "saved splits":
            datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(path)
        case "folder":
            path.mkdir()
            (path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
            (path / "test.jsonl").write_text(json.dumps(ROWS[0]))
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "saved", "saved splits", "folder"])
def test_load_rows_from_each_source(tmp_path, kind):
    expected = [{name: str(cell) for name, cell in row.items()} for row in ROWS] if kind == "csv" else ROWS
    assert [dict(row) for row in load_rows(write(tmp_path, kind))] == expected


@pytest.mark.parametrize("kind", ["saved splits", "folder"])
def test_splits(tmp_path, kind):
    path = write(tmp_path, kind)
    assert len(list(load_rows(path, prefer=("validation", "test")))) == 1
    assert len(list(load_rows(f"{path}#test"))) == 1


def test_a_slice_of_a_split(tmp_path):
    assert len(list(load_rows(write(tmp_path, "jsonl") + "#train[:2]"))) == 2


def test_objects_in_memory_are_returned_unchanged():
    data = datasets.Dataset.from_list(ROWS)
    assert load_rows(data) is data and load_rows(ROWS) is ROWS
    assert load_rows(datasets.DatasetDict(train=data)) is data


def test_reading_a_file_leaves_no_cache_and_sees_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "a.jsonl"
    for text in ("one", "two"):
        path.write_text(json.dumps({"prompt": text}))
        assert list(load_rows(str(path))) == [{"prompt": text}]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_list_must_contain_dicts():
    with pytest.raises(ValueError, match="row 0 is 3: rows must be dicts"):
        load_rows([3])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the list is empty"),
        (datasets.Dataset.from_list([]), "the Dataset is empty"),
    ],
)
def test_empty_data_raise(rows, message):
    with pytest.raises(ValueError, match=message):
        load_rows(rows)


def test_a_stream_raises():
    with pytest.raises(ValueError, match=r"the IterableDataset is a stream .* streaming=True"):
        load_rows(datasets.Dataset.from_list(ROWS).to_iterable_dataset())


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("no.jsonl", None, FileNotFoundError, "no.jsonl' does not exist"),
        ("a.txt", "x", ValueError, "use .json, .jsonl, .csv, .parquet"),
        ("a.csv", "", ValueError, "a.csv' is empty"),
        ("a.jsonl", "{broken", ValueError, "a.jsonl' could not be read: line 1 is not JSON"),
        ("", None, FileNotFoundError, "no data in the folder"),
    ],
)
def test_an_unreadable_file_raises(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        load_rows(str(tmp_path / name))


def test_neither_local_nor_on_the_hub_raises():
    with pytest.raises(FileNotFoundError, match="'nobody/nothing-here' is neither a local file"):
        load_rows("nobody/nothing-here")


def test_an_unknown_split_raises(tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'; its splits: train, test"):
        load_rows(write(tmp_path, "saved splits") + "#dev")


def test_several_splits_without_a_selection_raise(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    path = tmp_path / "d"
    datasets.DatasetDict(a=data, b=data).save_to_disk(path)
    with pytest.raises(ValueError, match=r"has the splits a, b: select one, as in '.*d#a'"):
        load_rows(str(path))
