from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from mpfx.lm import TextSource, parse_source, read_documents


def documents(spec: object) -> list[str]:
    return list(read_documents(parse_source(str(spec)), "calibration"))


def dataset(spec: str, name: str, config: str | None, split: str, column: str = "text") -> TextSource:
    return TextSource(spec=spec, kind="dataset", name=name, config=config, split=split, column=column)


@pytest.mark.parametrize(
    ("spec", "name", "config", "split", "column"),
    [
        ("wikitext:wikitext-2-raw-v1:train", "wikitext", "wikitext-2-raw-v1", "train", "text"),
        ("allenai/c4:en:train", "allenai/c4", "en", "train", "text"),
        ("ptb_text_only:test@sentence", "ptb_text_only", None, "test", "sentence"),
    ],
)
def test_data_set_names(spec: str, name: str, config: str | None, split: str, column: str) -> None:
    assert parse_source(spec) == dataset(spec, name, config, split, column)


@pytest.mark.parametrize("spec", ["c4", "", ":train", "c4:", "c4::train", "a:b:c:d", "c4:en:train@", "@text"])
def test_what_names_no_text_is_refused_with_the_allowed_forms(spec: str) -> None:
    with pytest.raises(ValueError, match=r"pydocs.*NAME\[:CONFIG\]:SPLIT"):
        parse_source(spec)


@pytest.mark.parametrize("spec", ["notes.txt", "./notes", "/nowhere/notes", "notes.jsonl@body"])
def test_missing_file(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="No such text file"):
        parse_source(spec)


def test_folder_without_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: name a split.*:train"):
        parse_source(str(tmp_path))


@pytest.mark.parametrize("name", ["notes.txt", "notes", "notes.md", "a:b.txt", "me@home.txt"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("\ufeffUm\u00e4\n\n  Laut\n".encode())
    assert documents(path) == ["Um\u00e4\n\n  Laut\n"]


def test_json_lines_columns(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "one", "body": "two"}\n\n{"text": null, "body": "four\u2028"}\n', encoding="utf-8")
    assert documents(path) == ["one"]
    assert documents(f"{path}@body") == ["two", "four\u2028"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        (b'["a"]\n', "line 1: expected a JSON object but got list"),
        (b'{"text": "a"}\n{"body": "b", "id": 1}\n', "line 2: no column 'text'; found: 'body', 'id'"),
        (b'{"text": 3}\n', "line 1: column 'text' holds int, not text"),
        (b'{"text": "a\xff"}\n', "not UTF-8: byte 0xff"),
        (b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        documents(path)
    assert "bad.jsonl" in str(error.value)


@pytest.mark.parametrize(("content", "message"), [(b" \n", "is empty"), (b"caf\xe9", "byte 0xe9 at position 3")])
def test_bad_text_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(path)


def test_a_text_file_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="no column 'body'"):
        parse_source(f"{tmp_path / 'a.txt'}@body")


def test_pydocs_parts_are_disjoint_and_complete() -> None:
    source = parse_source("pydocs")
    parts = [list(read_documents(source, part)) for part in ("calibration", "evaluation")]
    topics = sys.modules["pydoc_data.topics"].topics
    assert sorted(parts[0] + parts[1]) == sorted(topics.values())
    assert not set(parts[0]) & set(parts[1])
    assert parts[1] == [topics[name] for name in sorted(topics)[3::4]]


def test_pydocs_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match="without its documentation topics"):
        documents("pydocs")


def test_same_text_sees_through_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("x")
    os.symlink("a.txt", "link.txt")
    os.link("a.txt", "hard.txt")
    first = parse_source("a.txt")
    same = ["./a.txt", str(tmp_path / "a.txt"), f"../{tmp_path.name}/a.txt", "link.txt", "hard.txt"]
    assert all(first.same_text(parse_source(spec)) for spec in same)
    assert not any(first.same_text(parse_source(spec)) for spec in ("b.txt", "pydocs"))


def test_folder_in_the_shape_of_c4(c4_folder: Path) -> None:
    train = documents(f"{c4_folder}:en:train")
    assert train == [f"train {shard} {row:04}" for shard in range(2) for row in range(200)]
    assert documents(f"{c4_folder}:en:validation@url")[:2] == ["u0", "u1"]


def test_a_folder_may_have_colons_and_at_signs_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "my:data@home"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"text": "hello"}) + "\n")
    assert parse_source(f"{folder}:train").name == str(folder.resolve())
    assert parse_source(f"{folder}:en:train@url").column == "url"


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":fr:train", "fr"),
        (":en:test", "test"),
        (":en:train@body", "row 0: no column 'body'; found: 'text', 'url'"),
    ],
)
def test_bad_data_sets(c4_folder: Path, suffix: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        documents(f"{c4_folder}{suffix}")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"Cannot read the data set .*:train"):
        documents(f"{tmp_path}:train")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match=r"Cannot read the data set"):
        documents(f"{tmp_path}:train")


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match=r"no such local folder, and the Hub said: ConnectionError: no route") as error:
        documents("allenai/c4:en:train")
    assert isinstance(error.value.__cause__, ConnectionError)


def test_progress_bars_are_left_as_they_were(c4_folder: Path) -> None:
    import datasets

    before = datasets.utils.are_progress_bars_disabled()
    documents(f"{c4_folder}:en:validation")
    assert datasets.utils.are_progress_bars_disabled() == before
