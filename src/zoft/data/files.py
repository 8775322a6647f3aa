"""Rows in files: .jsonl, .json, .csv and .parquet."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zoft.errors import UserError

from .task import Row

LONGEST = 2**31 - 1  # characters of a CSV field; Python's own limit is that of a few pages
Places = Iterator[tuple[str, Row]]


def file_rows(path: Path) -> Places:
    """Place ("file:line") and raw row, one by one; text is UTF-8 with or without a byte order mark, any line ends.

    Raises UserError, with file and line, for everything that can be wrong with a file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if not is_rows(path):
        raise UserError(f"{path}: expected a {SUFFIXES} file, or a folder with train.jsonl in it")
    try:
        yield from READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); convert the file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror or error}") from error


def is_rows(path: Path) -> bool:
    """Whether a file of this name holds rows."""
    return path.suffix.lower() in READERS


def split_file(folder: Path, *stems: str) -> Path:
    """The file of one of these names, the first that is there. Raises UserError if none is."""
    files = {f"{entry.stem}{entry.suffix.lower()}": entry for entry in folder.iterdir()}
    for stem in stems:
        for suffix in READERS:
            if (file := files.get(f"{stem}{suffix}")) and file.is_file():
                return file
    there = ", ".join(sorted(entry.name for entry in files.values())) or "nothing"
    raise UserError(f"{folder}: no {stems[0]}.jsonl ({SUFFIXES}); the folder holds {there}")


def _json_lines(path: Path) -> Places:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, _object(_parsed(line, place), place)


def _json_array(path: Path) -> Places:
    text = path.read_text(encoding="utf-8-sig")
    rows = _parsed(text, str(path)) if text.lstrip().startswith("[") else None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected an array of JSON objects; one object a line belongs into a .jsonl file")
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", _object(row, f"{path} row {number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip("\n") else ""
        raise UserError(f"{place}: broken JSON at {line}column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested as deeply
        raise UserError(f"{place}: cannot read this JSON: {error}") from error


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected a JSON object, found {type(row).__name__}")
    return row


def _csv_rows(path: Path) -> Places:
    csv.field_size_limit(LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}:{reader.line_num}: the row has not as many fields as the header")
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            # The reader counts a line when it has parsed it.
            raise UserError(f"{path}:{reader.line_num + 1}: broken CSV: {error}") from error


def _parquet_rows(path: Path) -> Places:
    import pyarrow  # comes with datasets; here, as it takes half a second that no other file needs
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: broken Parquet: {str(error).splitlines()[0]}") from error


READERS: dict[str, Callable[[Path], Places]] = {
    ".jsonl": _json_lines,
    ".json": _json_array,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
SUFFIXES = ".jsonl, .json, .csv or .parquet"
