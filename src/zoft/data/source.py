"""Rows: from files of the user, or from the hub."""

import csv
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from zoft.errors import UserError

from .task import Row, Task

Split = Literal["train", "validation"]


def load_rows(task: Task, data: str | Path | None, split: Split) -> list[Row]:
    """The rows of a split, in stored order, as `task.read` gives them.

    data: None for the task's data set on the hub; or a folder with train.jsonl and validation.jsonl (or .csv),
    where test.jsonl (or .csv) stands in for a missing validation file, as some benchmarks have only that; or one
    .jsonl or .csv file, of which the last tenth (at least 1 row, at most 500) is held out as "validation".
    Rows whose label is -1, as the hub has them where the label is unknown, are left out.

    Raises UserError, with file and line, for everything that can be wrong with the data.
    """
    path = Path(data) if data is not None else None
    if path is None:
        found = _hub_rows(task, split)
    elif path.is_dir():
        found = _file_rows(_split_file(path, split))
    else:
        found = _file_rows(path)
    rows = [_read(task, place, raw) for place, raw in found if not _unlabelled(task, raw)]
    if not rows:
        raise UserError(f"{path or task.title}: no labelled rows for {split}")
    if path is not None and path.is_file():
        if len(rows) < 2:
            raise UserError(f"{path}: one row cannot serve both training and validation; bring more data")
        held = max(1, min(500, len(rows) // 10))
        rows = rows[:-held] if split == "train" else rows[-held:]
    return rows


def first_row(data: str | Path) -> Row:
    """The first training row of a file or folder, as it is stored. Raises UserError as `load_rows` does."""
    path = Path(data)
    for _, row in _file_rows(_split_file(path, "train") if path.is_dir() else path):
        return row
    raise UserError(f"{path}: no rows")


def sample(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` rows drawn without replacement, in their stored order; all of them if there are no more."""
    chosen = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in sorted(chosen)]


def hold_out(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows without `count` drawn ones, and these, both in stored order. Raises UserError if none remain."""
    if count >= len(rows):
        raise UserError(f"cannot hold {count} rows out of {len(rows)}; lower the number or bring more data")
    held = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for index, row in enumerate(rows) if index not in held],
        [rows[index] for index in sorted(held)],
    )


def _read(task: Task, place: str, raw: Row) -> Row:
    try:
        return task.read(raw)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _unlabelled(task: Task, raw: Row) -> bool:
    return str(raw.get(task.label)) == "-1" and "-1" not in task.words


def _hub_rows(task: Task, split: Split) -> Iterator[tuple[str, Row]]:
    if task.hub is None:
        raise UserError(f"task {task.name} has no data set on the hub; pass --data")
    path, config = task.hub
    name = task.splits.get(split, split)
    try:
        rows = _load_dataset(path, config, name)
    except Exception as error:  # whatever the network, the cache or the hub may raise
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"cannot load {path} ({name}) from the hub: {type(error).__name__}: {reason}; "
            "pass --data with a folder that holds train.jsonl and validation.jsonl"
        ) from error
    return ((f"{path} {name} row {number}", row) for number, row in enumerate(rows))


def _load_dataset(path: str, config: str | None, split: str) -> Iterable[Row]:
    import datasets  # here, as it takes a second that no other source of rows needs

    try:
        return datasets.load_dataset(path, config, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # Some older data sets are a script on the main branch; the hub keeps a converted copy of them.
        return datasets.load_dataset(path, config, split=split, revision="refs/convert/parquet")


def _split_file(folder: Path, split: Split) -> Path:
    stems = ("train",) if split == "train" else ("validation", "test")
    for stem in stems:
        for suffix in (".jsonl", ".csv"):
            if (file := folder / f"{stem}{suffix}").is_file():
                return file
    files = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise UserError(f"{folder}: no {split}.jsonl or {split}.csv; the folder holds {files}")


def _file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Place ("file:line") and raw row, one by one; UTF-8 with or without a byte order mark, any line ends."""
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix not in readers:
        raise UserError(f"{path}: expected a .jsonl or .csv file, or a folder with train.jsonl in it")
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); convert the file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{place}: broken JSON at column {error.colno}: {error.msg}") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested as deeply
                raise UserError(f"{place}: cannot read this JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{place}: expected one JSON object a line, found {type(row).__name__}")
            yield place, row


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
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
