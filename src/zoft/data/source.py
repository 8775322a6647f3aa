"""Rows: from files of the user, or from the hub."""

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from zoft.errors import UserError

from .files import Places, file_rows, is_rows, split_file
from .task import Row, Task

Split = Literal["train", "validation"]
NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev", "test")}


def load_rows(task: Task, data: str | Path | None, split: Split) -> list[Row]:
    """The rows of a split, in stored order, as `task.read` gives them.

    data: None for the task's data set on the hub; or a folder with files train and validation (.jsonl, .json, .csv or
    .parquet), where test stands in for a missing validation, as some benchmarks have only that; or one such file; or a
    data set of the hub, "owner/name" or "owner/name:configuration". Of one file, or a data set without a split for
    validation, the last tenth (at least 1 row, at most 500) is held out as that.
    Rows to classify or choose for whose label is -1, as the hub has them where the label is unknown, are left out.

    Raises UserError, with file and line, for everything that can be wrong with the data.
    """
    found, whole = (_task_rows(task, split), False) if data is None else _own_rows(data, split)
    rows = [_read(task, place, raw) for place, raw in found if not _unlabelled(task, raw)]
    if not rows:
        raise UserError(f"{data or task.title}: no labelled rows for {split}")
    if whole:
        if len(rows) < 2:
            raise UserError(f"{data}: one row cannot serve both training and validation; bring more data")
        held = max(1, min(500, len(rows) // 10))
        rows = rows[:-held] if split == "train" else rows[-held:]
    return rows


def first_row(data: str | Path) -> Row:
    """The first row, as it is stored: for training, if there are such. Raises UserError as `load_rows` does."""
    path = Path(data)
    every = NAMES["train"] + NAMES["validation"]  # where it is evaluated only, training rows may be missing
    found = file_rows(split_file(path, *every)) if path.is_dir() else _own_rows(data, "train")[0]
    for _, row in found:
        return row
    raise UserError(f"{data}: no rows")


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
    labelled = task.kind in ("classification", "choice")  # an answer may well be "-1"
    return labelled and str(raw.get(task.label)) == "-1" and "-1" not in task.words


def _own_rows(data: str | Path, split: Split) -> tuple[Places, bool]:
    """The rows of `data`, and whether they are of all splits together."""
    path, name = Path(data), Path(data).as_posix()
    if path.is_dir():
        return file_rows(split_file(path, *NAMES[split])), False
    local = path.exists() or path.parent.is_dir() or is_rows(path)
    if local or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        return file_rows(path), True
    return _hub_rows(name, split)


def _hub_rows(data: str, split: Split) -> tuple[Places, bool]:
    from datasets import get_dataset_split_names

    path, _, config = data.partition(":")
    try:
        splits = get_dataset_split_names(path, config or None)
    except Exception as error:  # whatever the network, the cache or the hub may raise
        raise UserError(f"{data}: no such file or folder, and not to be had from the hub: {_reason(error)}") from error
    train, held = (
        next((split for name in NAMES[kind] for split in splits if split.startswith(name)), None)
        for kind in ("train", "validation")
    )
    if train is None:
        raise UserError(f"{data}: no split train; the data set has {', '.join(splits)}")
    chosen = held if held is not None and split == "validation" else train
    return _hub_split(path, config or None, chosen), held is None


def _task_rows(task: Task, split: Split) -> Places:
    if task.hub is None:
        raise UserError(f"task {task.name} has no data set on the hub; pass --data")
    return _hub_split(*task.hub, task.splits.get(split, split))


def _hub_split(path: str, config: str | None, name: str) -> Places:
    try:
        rows = _load_dataset(path, config, name)
    except Exception as error:  # whatever the network, the cache or the hub may raise
        raise UserError(
            f"cannot load {path} ({name}) from the hub: {_reason(error)}; "
            "pass --data with a folder that holds train.jsonl and validation.jsonl"
        ) from error
    return ((f"{path} {name} row {number}", row) for number, row in enumerate(rows))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _load_dataset(path: str, config: str | None, split: str) -> Iterable[Row]:
    import datasets  # here, as it takes a second that no other source of rows needs

    try:
        return datasets.load_dataset(path, config, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # Some older data sets are a script on the main branch; the hub keeps a converted copy of them.
        return datasets.load_dataset(path, config, split=split, revision="refs/convert/parquet")
