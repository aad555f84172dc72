"""All data files of a folder are read, and nothing else."""

import errno
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lit_rlhf.data import load_rows


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"file": name}
        if path.suffix == ".parquet":
            datasets.Dataset.from_list([row]).to_parquet(path)
        else:
            path.write_text(f"file\n{name}\n" if path.suffix == ".csv" else json.dumps(row))
    return str(folder)


def files(source, **options):
    return [row["file"] for row in load_rows(source, **options)]


def test_a_card_and_a_script_change_nothing(tmp_path):
    folder = write(tmp_path / "data", "a.jsonl", "b.jsonl")
    write(tmp_path, "secret.jsonl")
    card = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n# Data\n"
    for target in ("../secret.jsonl", "b.jsonl", str(tmp_path / "secret.jsonl")):
        (tmp_path / "data/README.md").write_text(card.format(target))
        (tmp_path / "data/data.py").write_text("raise SystemExit")
        assert files(folder) == ["a.jsonl", "b.jsonl"]


def test_hidden_files_backups_and_descriptions_are_ignored(tmp_path):
    ignored = [".a.jsonl", ".git/a.jsonl", "__MACOSX/._a.jsonl", "__pycache__/a.jsonl", "~$a.jsonl", "a.jsonl~"]
    folder = write(tmp_path, "a.jsonl", *ignored, "a.jsonl.bak", "#a.jsonl#", "dataset_info.json", "notes.txt")
    assert files(folder) == ["a.jsonl"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["a", "b"], ["a", "b"], ["a", "b"]),
        (["train", "test"], ["train"], ["test"]),
        (["train", "extra", "val"], ["extra", "train"], ["val"]),
        (["data/train-00000-of-00002", "data/train-00001-of-00002", "data/dev-00000-of-00001"],
         ["data/train-00000-of-00002", "data/train-00001-of-00002"], ["data/dev-00000-of-00001"]),
        (["train/1", "train/deep/2", "Test/1"], ["train/1", "train/deep/2"], ["Test/1"]),
        (["training_1", "eval-set", "trainer"], ["trainer", "training_1"], ["eval-set"]),
        (["test"], ["test"], ["test"]),
    ],
    ids=lambda names: names[0],
)  # fmt: skip
def test_splits_of_a_folder(tmp_path, names, train, test, suffix):
    folder = write(tmp_path, *(f"{name}.{suffix}" for name in names))
    assert files(folder) == [f"{name}.{suffix}" for name in train]
    assert files(folder, prefer=("validation", "test")) == [f"{name}.{suffix}" for name in test]


def test_a_series_with_another_name_is_a_split(tmp_path):
    names = [f"data/{name}-00000-of-00001.parquet" for name in ("train_sft", "train_gen", "test_sft")]
    folder = write(tmp_path, *names)
    assert files(f"{folder}#train_gen") == [names[1]]
    with pytest.raises(ValueError, match="has the splits test_sft, train_gen, train_sft: select one"):
        load_rows(folder)


def test_slices_of_splits(tmp_path):
    folder = write(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl", "test.jsonl")
    assert files(f"{folder}#train[1:]") == ["b.jsonl", "c.jsonl"]
    assert files(f"{folder}#train[:1]+test") == ["a.jsonl", "test.jsonl"]
    for split in ("dev", "train[x]", "", "train[0.5]"):
        with pytest.raises(ValueError, match=rf"has no split {split!r}; its splits: train, test".replace("[", r"\[")):
            load_rows(f"{folder}#{split}")


def test_links_are_followed_and_a_circle_ends(tmp_path):
    write(tmp_path / "blobs", "0f3a.jsonl")
    write(tmp_path / "disk", "b.jsonl")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").symlink_to(tmp_path / "blobs/0f3a.jsonl")
    (folder / "more").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(folder)
    assert files(str(folder)) == ["0f3a.jsonl", "b.jsonl"]
    (folder / "c.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"c.jsonl' could not be read: FileNotFoundError"):
        load_rows(str(folder))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.csv", "b.jsonl"], "several kinds, such as 'a.csv' and 'b.jsonl': keep one kind"),
        (["train.parquet", "test.json"], "several kinds"),
        (["train-00000-of-00003.csv", "train-00002-of-00003.csv"], "2 files for the split 'train', .*not one complete"),
        (["main/test-00000-of-00001.csv", "other/test-00000-of-00001.csv"], "2 files for the split 'test', .*complete"),
        ([], "no data in the folder"),
        ([".hidden.jsonl"], "no data in the folder"),
    ],
)
def test_folders_that_are_no_data_set_are_refused(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path, *names))


def test_a_file_without_a_common_column_is_refused(tmp_path):
    folder = write(tmp_path, "train.jsonl")
    (tmp_path / "metadata.json").write_text('{"rows": 1}')
    with pytest.raises(ValueError, match=r"train.jsonl' has the columns \['file'\] and .*metadata.json' \['rows'\]"):
        load_rows(folder)


def test_tables_of_different_types_are_refused(tmp_path):
    for name, value in {"a": 1, "b": "x"}.items():
        datasets.Dataset.from_list([{"file": value}]).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"a.parquet' and the files beside it have columns of different types"):
        load_rows(str(tmp_path))


def test_a_saved_dataset_reads_only_its_own_folder(tmp_path):
    data = datasets.Dataset.from_list([{"file": "own"}] * 3)
    data.save_to_disk(tmp_path / "own")
    datasets.Dataset.from_list([{"file": "secret"}]).save_to_disk(tmp_path / "secret")
    assert files(str(tmp_path / "own")) == ["own"] * 3
    state = json.loads((tmp_path / "own/state.json").read_text())
    (secret,) = (tmp_path / "secret").glob("*.arrow")
    state["_data_files"] = [{"filename": f"../secret/{secret.name}"}]
    (tmp_path / "own/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"own' refers to '.*secret.*arrow', outside of the folder"):
        load_rows(str(tmp_path / "own"))


@pytest.mark.parametrize("saved", [False, True])
def test_a_table_does_not_make_other_files_be_read(saved, tmp_path):
    """A cell of an image names a file or an address, which would be opened."""
    kinds = {"one": datasets.Image(), "many": datasets.List({"content": datasets.Image()}), "tools": datasets.Json()}
    image = {"bytes": b"no image" if saved else None, "path": str(tmp_path / "picture.png")}
    schema, columns = datasets.Features(kinds).arrow_schema, ([image], [[{"content": image}]], ['{"a": [1, "b"]}'])
    arrays = [pyarrow.array(values, type=field.type) for values, field in zip(columns, schema, strict=True)]
    table = pyarrow.Table.from_arrays(arrays, schema=schema)
    if saved:
        datasets.Dataset(table).save_to_disk(tmp_path)
    else:
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = load_rows(str(tmp_path))
    stored = {**image, "path": "picture.png" if saved else image["path"]}
    assert row == {"one": stored, "many": [{"content": stored}], "tools": {"a": [1, "b"]}}


def test_a_saved_dataset_is_whole_and_alone(tmp_path):
    data = datasets.Dataset.from_list([{"file": "a"}] * 3)
    datasets.DatasetDict(train=data, dev=data.select([0])).save_to_disk(tmp_path)
    assert files(f"{tmp_path}#train[:2]") == ["a"] * 2
    (tmp_path / "train/state.json").write_text("{")
    with pytest.raises(ValueError, match="could not be read: JSONDecodeError"):
        load_rows(str(tmp_path))
    write(tmp_path, "more.jsonl")
    with pytest.raises(ValueError, match=r"written by save_to_disk, but contains '.*more.jsonl' too"):
        load_rows(str(tmp_path))


def test_a_local_folder_has_no_configurations(tmp_path, monkeypatch):
    write(tmp_path / "owner/name", "a.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'owner/name' is local and has no configuration 'default'"):
        load_rows("owner/name:default")


def test_a_subfolder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path, "a.jsonl", "b/c.jsonl")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "b":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    refused = pytest.raises(ValueError, match=r"the folder '.*/b' can't be read: Permission denied")
    with monkeypatch.context() as patch, refused:
        patch.setattr(os, "scandir", refuse)
        load_rows(folder)
