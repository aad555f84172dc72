"""Data files are read with the types that they have, or refused with the file and the line."""

import bz2
import gzip
import json
import lzma
import os
import zipfile
from pathlib import Path

import datasets
import pyarrow
import pytest

from lit_rlhf.data import load_rows
from lit_rlhf.data.readers import read_file

VALUES = {
    "date": "1969-07-20",
    "time": "2024-01-01T00:00:00Z",
    "digits": "007",
    "number": "1e5",
    "missing": "NA",
    "truth": "true",
    "none": None,
    "integer": 10**30,
    "share": 0.1,
    "yes": True,
    "empty": "",
    "list": [1, "a", None, {"x": 1}],
    "nested": {"b": None, "a": []},
    "letters": "ünï\u2028code 😀",
}


def jsonl(rows, **options):
    return "\n".join(json.dumps(row, **options) for row in rows)


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("form", ["lines", "windows lines", "list", "indented list", "bom"])
def test_json_keeps_values_and_their_types(tmp_path, form, ascii):
    rows = [VALUES, {"number": 1}, {"number": 1.0}, {"number": "1", "list": {}}]
    text = jsonl(rows, ensure_ascii=ascii) + "\n\n"
    if "list" in form:
        text = json.dumps(rows, ensure_ascii=ascii, indent=2 if "indented" in form else None)
    newline = "\r\n" if form == "windows lines" else "\n"
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8-sig" if form == "bom" else "utf-8", newline=newline)
    read = load_rows(str(path))
    assert read == rows and list(map(repr, read)) == list(map(repr, rows))


def test_an_indented_object_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(VALUES, indent=1))
    assert load_rows(str(tmp_path / "a.json")) == [VALUES]


def test_csv_cells_are_strings_and_empty_ones_none(tmp_path):
    cells = ["007", "NA", "None", "nan", "1e5", "1,5", "true", "1969-07-20", " a ", 'a "b"', "a\nb", "é", "x" * 200_000]
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
    path = tmp_path / "rows.csv"
    path.write_text("prompt,answer\n\n" + "".join(f"{cell},\n" for cell in quoted), encoding="utf-8-sig")
    assert load_rows(str(path)) == [{"prompt": cell, "answer": None} for cell in cells]


OPENERS = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "GZ": gzip.open}


@pytest.mark.parametrize("suffix", [*OPENERS, "zst", "lz4", "zip"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_compressed_files_are_read(tmp_path, suffix, kind):
    path = tmp_path / f"rows.{kind}.{suffix}"
    content = ("a,b\ncé,7\n" if kind == "csv" else jsonl([{"a": "cé", "b": "7"}])).encode()
    if suffix == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data/rows", content)
            archive.writestr("__MACOSX/._rows", "x")
    else:
        with OPENERS.get(suffix, pyarrow.output_stream)(str(path), *["wb"] * (suffix in OPENERS)) as file:
            file.write(content)
    assert load_rows(str(path)) == [{"a": "cé", "b": "7"}]


def test_parquet_keeps_its_types(tmp_path):
    rows = [{"n": 7, "when": None, "tags": ["a"], "s": "007"}, {"n": None, "when": 2.5, "tags": [], "s": "NA"}]
    path = tmp_path / "with [brackets] and *.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert list(load_rows(str(path))) == rows
    assert list(load_rows(f"{path}#train[1:]")) == rows[1:]
    assert list(load_rows(f"{path}#train[:1]+train[:50%]")) == [rows[0]] * 2


def refused(name: str, content: bytes | str, message: str, line: int | None = None):
    return pytest.param(name, content, message, line, id=message)


@pytest.mark.parametrize(
    ("name", "content", "message", "line"),
    [
        refused("a.jsonl", '{"a": 1}\n{"a": "é"}'.encode("latin-1"), "is not UTF-8 text", 2),
        refused("a.csv", "a\nb\n\né\n".encode("cp1252"), "is not UTF-8 text .*save the file as UTF-8", 4),
        refused("a.json", '[{"a": 1}]'.encode("utf-16"), "is not UTF-8 .*iconv", 1),
        refused("a.jsonl", b'{"a": 1}\n\n{"a": 1}}\n', "is not JSON: Extra data at character 9", 3),
        refused("a.jsonl", b'{"a": 1}\n{"a": "b', "is not JSON: Unterminated string", 2),
        refused("a.json", b'[\n{"a": 1},\n{"a": 2,}\n]', "is not JSON: .* at character", 3),
        refused("a.jsonl", b'{"a": 1}\n[1]\n', r"has the row \[1\]: a row must be an object", 2),
        refused("b.json", b'[{"a": 1}, "b"]', "has the row 'b': a row must be an object", 1),
        refused("c.json", b"3", "has the row 3: a row must be an object", 1),
        refused("d.json", b'{"a": 1' + b"0" * 5000 + b"}", "is not JSON: Exceeds the limit", 1),
        refused("e.json", b"[" * 100_000, "is not JSON", 1),
        refused("b.csv", b"a,b\n1,2\n1\n", "has 1 cells, but the first line names 2 columns", 3),
        refused("c.csv", b"a,b\n1,2,3\n", "has 3 cells, but the first line names 2 columns: put cells with commas", 2),
        refused("d.csv", b'a,b\n1,"2\n3,4\n', "unexpected end of data", 3),
        refused("e.csv", b'a\n"b"c\n', "expected after", 2),
        refused("f.csv", b"a,b,a\n1,2,3\n", "it has several columns 'a': rename all but one"),
        refused("a.parquet", b"PAR1", "ArrowInvalid"),
        refused("b.parquet", b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS: fetch"),
        refused("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
        refused("g.jsonl", gzip.compress(b'{"a": 1}'), "it is compressed with gzip: add .gz to its name"),
        refused("g.csv", b"PK\x03\x04", "it is a zip archive or a spreadsheet: export it as csv"),
        refused("h.csv", b"PAR1", "it is a parquet file: let its name end in .parquet"),
        refused("f.json", b"<!DOCTYPE html>\n", "it is a web page: download the data file"),
        refused("g.json", b'{"a": 1},\n{"a": 2},\n', "is not JSON: .*: write one object per line, or one list", 1),
        refused("i.csv", b"a;b\n1;2\n", "the first line is one cell, 'a;b': separate cells by commas, not ';'"),
        refused("j.csv", b"a\tb\n1\t2,5\n", r".*one cell, 'a\\tb': separate cells by commas, not '\\t'"),
        refused("b.jsonl.gz", b'{"a": 1}', "BadGzipFile"),
        refused("c.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-9], "EOFError"),
        refused("d.jsonl.zip", b"PK", "BadZipFile"),
        refused("e.jsonl.zst", b"x", "OSError"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path, name, content, message, line):
    (tmp_path / name).write_bytes(content)
    line_message = "" if line is None else f"line {line}.*"
    with pytest.raises(ValueError, match=f"{name}' could not be read: {line_message}{message}"):
        load_rows(str(tmp_path / name))


def test_an_archive_of_several_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        for name in "ab":
            archive.writestr(name, "{}")
    with pytest.raises(ValueError, match="it contains 2 files"):
        load_rows(str(tmp_path / "a.jsonl.zip"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl~", "a.jsonl.bak", "a.tsv", "jsonl", "a.gz"])
def test_other_kinds_of_files_are_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"has no supported file type: use .json, .jsonl, .csv, .parquet"):
        load_rows(str(tmp_path / name))


def test_a_file_without_rows_is_empty(tmp_path):
    for name, text in {"a.csv": "", "b.csv": "a,b\n", "c.jsonl": "\n\n", "d.json": "[]"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}' is empty"):
            load_rows(str(tmp_path / name))


def test_rows_share_the_names_of_their_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl([{"a name": 1}] * 2))
    first, second = read_file(Path(tmp_path / "a.jsonl"))
    assert next(iter(first)) is next(iter(second))


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows.jsonl' is no file but a pipe, .*: write the rows to a file"):
        read_file(tmp_path / "rows.jsonl")
