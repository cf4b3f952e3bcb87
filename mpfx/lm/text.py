"""Where texts come from: Python's own documentation, local files, and data sets.

A text is named by one string:

========================================= =====================================================================
``pydocs``                                the language topics of CPython's documentation, offline everywhere
``notes.txt`` (any other suffix)          a local file: one document
``notes.jsonl``, ``notes.json``           JSON Lines: one document a line
``wikitext:wikitext-2-raw-v1:train``      ``NAME[:CONFIG]:SPLIT`` of a data set on the Hugging Face Hub, or of
                                          a local folder that ``datasets.load_dataset`` understands; streamed
========================================= =====================================================================

JSON Lines and data sets read the column ``text``; append ``@COLUMN`` for another: ``notes.jsonl@body``,
``allenai/c4:en:train@url``. What exists as a file under the very name is that file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Part = Literal["calibration", "evaluation"]
Kind = Literal["pydocs", "text", "jsonl", "dataset"]

FILES: tuple[Kind, ...] = ("text", "jsonl")
DEFAULT_COLUMN = "text"
PYDOCS = "pydocs"
_PYDOCS_EVALUATION_EVERY = 4
_FORMS = (
    "`pydocs`, a text file, a .jsonl file, or NAME[:CONFIG]:SPLIT of a data set "
    "(both of the latter with an optional @COLUMN)"
)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A parsed name of a text.

    Attributes:
        spec: The name as it was written, for messages.
        kind: What it is.
        name: The resolved path, or the name on the Hub.
        config: The data set's configuration, if one was named.
        split: The data set's split; empty for the other kinds.
        column: The column that holds the text (JSON Lines and data sets).
    """

    spec: str
    kind: Kind
    name: str
    config: str | None = None
    split: str = ""
    column: str = DEFAULT_COLUMN

    def same_text(self, other: TextSource) -> bool:
        """Tell whether both read the same file, or the same split of the same data set, in any column."""
        if self.kind in FILES and other.kind in FILES:
            return os.path.samefile(self.name, other.name)
        return self.kind == other.kind and (self.name, self.config, self.split) == (
            other.name,
            other.config,
            other.split,
        )


def parse_source(spec: str) -> TextSource:
    """Read the name of a text.

    Args:
        spec: One of the forms in this module's description.

    Raises:
        FileNotFoundError: If it can only be a path, and nothing is there.
        ValueError: If it has none of the forms.
    """
    if spec == PYDOCS:
        return TextSource(spec=spec, kind="pydocs", name=PYDOCS)
    base, column = _split_column(spec)
    if Path(base).is_file():
        return _parse_file(spec, base, column)
    return _parse_dataset(spec, base, column)


def read_documents(source: TextSource, part: Part) -> Iterator[str]:
    """Yield the documents of a text in their order.

    Args:
        source: The parsed name.
        part: Which half of ``pydocs``; the other kinds yield the same documents for both.

    Raises:
        ValueError: If a file is empty, not UTF-8 or not JSON Lines, or a column is missing or holds no text.
        OSError: If a data set cannot be reached.
    """
    if source.kind == "pydocs":
        return iter(_pydocs(part))
    if source.kind == "text":
        return iter([_read_text(source)])
    if source.kind == "jsonl":
        return _read_jsonl(source)
    return _read_dataset(source)


def _split_column(spec: str) -> tuple[str, str | None]:
    """Split ``BASE@COLUMN``; an ``@`` inside a folder's name or of an existing file is no column."""
    base, at, column = spec.rpartition("@")
    if not at or any(mark in column for mark in ("/", os.sep, ":")) or Path(spec).is_file():
        return spec, None
    if not base or not column:
        raise ValueError(f"Expected BASE@COLUMN but got {spec!r}. Allowed: {_FORMS}.")
    return base, column


def _parse_file(spec: str, base: str, column: str | None) -> TextSource:
    kind: Kind = "jsonl" if Path(base).suffix.lower() in (".jsonl", ".json") else "text"
    if kind == "text" and column is not None:
        raise ValueError(f"{base} is read as plain text, which has no column {column!r}. Leave out @{column}.")
    return TextSource(spec=spec, kind=kind, name=str(Path(base).resolve()), column=column or DEFAULT_COLUMN)


def _parse_dataset(spec: str, base: str, column: str | None) -> TextSource:
    name, config, split = _split_dataset(base)
    if not name or not split or config == "":
        _refuse(spec, base)
    if Path(name).is_dir():
        name = str(Path(name).resolve())
    return TextSource(spec=spec, kind="dataset", name=name, config=config, split=split, column=column or DEFAULT_COLUMN)


def _split_dataset(base: str) -> tuple[str, str | None, str]:
    """Split ``NAME[:CONFIG]:SPLIT``; a local folder may have colons in its own name."""
    for fields in (1, 2):
        name, *rest = base.rsplit(":", fields)
        if len(rest) == fields and Path(name).is_dir():
            break
    else:
        name, *rest = base.split(":")
    if len(rest) not in (1, 2):
        return base, None, ""
    return name, rest[0] if len(rest) == 2 else None, rest[-1]


def _refuse(spec: str, base: str) -> None:
    if base and Path(base).is_dir():
        raise ValueError(f"{spec!r} is a folder: name a split of it too, for example {base}:train.")
    if Path(base).suffix or base.startswith((".", "/", "~")):
        raise FileNotFoundError(f"No such text file: {spec!r}. Allowed: {_FORMS}.")
    raise ValueError(f"{spec!r} names no text. Allowed: {_FORMS}. For a data set, name a split: {base}:train.")


def _pydocs(part: Part) -> list[str]:
    """Return every fourth topic, sorted by name, for evaluation and the three between for calibration."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError(
            "This Python was installed without its documentation topics (module `pydoc_data`), so the text "
            "`pydocs` is not there. Name another text, or install the full standard library."
        ) from error
    chosen = part == "evaluation"
    last = _PYDOCS_EVALUATION_EVERY - 1
    return [
        topics[name]
        for index, name in enumerate(sorted(topics))
        if (index % _PYDOCS_EVALUATION_EVERY == last) == chosen
    ]


def _read_text(source: TextSource) -> str:
    with _utf8_errors(source):
        text = Path(source.name).read_text(encoding="utf-8-sig")
    if not text.strip():
        raise ValueError(f"{source.spec} is empty. Name a file with text.")
    return text


def _read_jsonl(source: TextSource) -> Iterator[str]:
    empty = True
    with _utf8_errors(source), open(source.name, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                empty = False
                where = f"{source.spec}, line {number}"
                yield from _column(_json_object(line, where), source.column, where)
    if empty:
        raise ValueError(f"{source.spec} is empty. Name a file with one JSON object a line.")


def _json_object(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}). Write one JSON object a line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object but got {type(row).__name__}. Write one object a line.")
    return row


def _column(row: Mapping[str, Any], column: str, where: str) -> Iterator[str]:
    """Yield the text of a row, or nothing where it is null."""
    if column not in row:
        found = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"{where}: no column {column!r}; found: {found}. Choose one by appending @COLUMN.")
    text = row[column]
    if text is None:
        return
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: column {column!r} holds {type(text).__name__}, not text. Choose another with @COLUMN."
        )
    yield text


def _read_dataset(source: TextSource) -> Iterator[str]:
    for number, row in enumerate(_stream_rows(source)):
        yield from _column(row, source.column, f"{source.spec}, row {number}")


def _stream_rows(source: TextSource) -> Iterator[Mapping[str, Any]]:
    """Stream a split: nothing is downloaded beyond what is read."""
    import datasets

    try:
        with _quiet_datasets():
            rows = datasets.load_dataset(source.name, source.config, split=source.split, streaming=True)
        yield from rows
    except Exception as error:  # file readers and network clients raise whatever they stumble over
        where = "the folder" if Path(source.name).is_dir() else "no such local folder, and the Hub"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"Cannot read the data set {source.spec!r} ({where} said: {type(error).__name__}: {error}). "
            "Check the name, the configuration and the split."
        ) from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Hide the progress bars of ``datasets`` inside the block only."""
    import datasets

    if datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.enable_progress_bars()


@contextmanager
def _utf8_errors(source: TextSource) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{source.spec} is not UTF-8: byte 0x{byte:02x} at position {error.start} of the part being read. "
            "Convert the file to UTF-8."
        ) from error
