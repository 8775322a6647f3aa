"""Files that people and machines write: whatever is in them, they are read, or refused in a `UserError`.

More inputs than here: ``pytest tests/test_fuzz.py --hypothesis-profile=long``.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from zoft.data import custom_task, form_of, load_rows, load_task
from zoft.errors import UserError
from zoft.optim import Trace
from zoft.train import TrainConfig
from zoft.train.checkpoints import last_checkpoint, seal
from zoft.train.steplog import (
    BACK,
    RUN,
    STEP,
    Back,
    Step,
    append,
    new_log,
    read_back,
    read_log,
    read_step,
    write_back,
    write_step,
)

NAMES = ["embed", "layer.0", "layer.1", "head"]
SETTINGS = [*TrainConfig.__dataclass_fields__, "nothing"]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), st.just("assistant") | VALUES), max_size=3
)
OWN = MESSAGES | VALUES
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


def accepted(read: Callable[[], Any]) -> Any:
    """What `read` returns; None if it refuses and says why."""
    try:
        return read()
    except UserError as error:
        assert str(error)
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- configurations ------------------------------------------------------------------------------------------


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b"steps: 2026-99-99")
@example(b"steps: " + b"1" * 5000)
@example(b"[" * 2000)
def test_config_of_any_bytes(folder: Path, content: bytes) -> None:
    (folder / "config.yaml").write_bytes(content)
    accepted(lambda: TrainConfig.load(folder / "config.yaml"))


@given(st.dictionaries(st.sampled_from(SETTINGS), VALUES, max_size=6))
def test_config_of_any_values(folder: Path, values: dict[str, Any]) -> None:
    """What is accepted is of the types that it should be, and reads again as it is."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "task": "sst2", "method": "agzo", "out": "o"} | values), "utf-8")
    config = accepted(lambda: TrainConfig.load(path))
    if config is not None:
        config.save(path)
        assert TrainConfig.load(path) == config


# --- rows ----------------------------------------------------------------------------------------------------


@given(
    st.binary(max_size=200) | st.text(max_size=200).map(str.encode),
    st.sampled_from(["jsonl", "json", "csv", "parquet"]),
)
@example(b'{"sentence": "a film", "label": ' + b"1" * 5000 + b"}", "jsonl")
@example(b"[" * 100_000, "jsonl")
@example(b"[" * 100_000, "json")
@example(b"sentence,label\n" + b"a" * 200_000 + b",1", "csv")
def test_rows_of_any_bytes(folder: Path, content: bytes, suffix: str) -> None:
    path = folder / f"rows.{suffix}"
    path.write_bytes(content)
    accepted(lambda: load_rows(load_task("sst2"), path, "train"))


@given(st.lists(st.dictionaries(st.sampled_from(["sentence", "label", "idx"]), VALUES), max_size=5))
def test_rows_of_any_values(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = load_task("sst2")
    for row in accepted(lambda: load_rows(task, path, "train")) or []:
        assert isinstance(task.show(row), str) and task.golds(row)[0] in (0, 1)


@given(st.dictionaries(st.sampled_from(["messages", "conversations", "prompt", "completion", "text"]), OWN, max_size=3))
def test_own_rows_of_any_values(row: dict[str, Any]) -> None:
    """What is accepted can be written by a chat template, or shown as text."""
    task = custom_task(form=form_of(row))
    read = accepted(lambda: task.read(row))
    if read is not None:
        assert isinstance(task.show(read), str) and isinstance(task.choices(read)[0], str)
        assert all(isinstance(turn["role"], str) and "content" in turn for turn in read.get("turns", []))


# --- the log of the steps ------------------------------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    directions, examples = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    along = st.lists(NUMBERS, min_size=examples, max_size=examples) if examples else NUMBERS
    found = [torch.tensor(draw(along), dtype=torch.float64) for _ in range(directions)]
    some = st.sets(st.sampled_from(NAMES))
    return Trace(found, [draw(some) for _ in found], draw(some), draw(some))


STEPS = st.lists(st.tuples(NUMBERS, st.lists(traces(), max_size=3)), max_size=4)


def written(path: Path, steps: list[tuple[float, list[Trace]]]) -> bytes:
    path.write_bytes(new_log({"seed": 0}))
    for number, (lr, left) in enumerate(steps):
        append(path, STEP, write_step(Step(number, lr, left), NAMES))
    append(path, BACK, write_back(Back(len(steps), 0)))
    return path.read_bytes()


@given(STEPS)
def test_log_is_read_as_it_was_written(folder: Path, steps: list[tuple[float, list[Trace]]]) -> None:
    path = folder / "steps.bin"
    written(path, steps)
    log = read_log(path)
    bodies = [record.body for record in log.records if record.kind == STEP]
    assert log.torn == 0 and log.steps == len(steps) and log.last(RUN) == b'{"seed": 0}'
    assert read_back(log.last(BACK) or b"") == Back(len(steps), 0)
    for number, (body, (lr, left)) in enumerate(zip(bodies, steps, strict=True)):
        found = read_step(body, NAMES)
        assert found.number == number and repr(found.lr) == repr(lr)
        for one, other in zip(found.traces, left, strict=True):
            assert [repr(g.tolist()) for g in one.gradients] == [repr(g.tolist()) for g in other.gradients]
            assert (list(one.still), one.shared, one.unread) == (list(other.still), other.shared, other.unread)


@given(STEPS, st.data())
def test_log_that_is_damaged(folder: Path, steps: list[tuple[float, list[Trace]]], data: st.DataObject) -> None:
    """Cut anywhere, or with any byte changed: what is read before the damage is what was written."""
    path = folder / "steps.bin"
    whole = written(path, steps)
    before = read_log(path).records
    place = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.integers(0, 255))
    damaged = whole[:place] + (b"" if change == 0 else bytes([whole[place] ^ change]) + whole[place + 1 :])
    path.write_bytes(damaged)
    log = accepted(lambda: read_log(path))
    if log is not None:
        assert log.records == before[: len(log.records)]
        assert log.records[-1].end <= place and log.torn == len(damaged) - log.records[-1].end


@given(st.binary(max_size=300))
def test_log_of_any_bytes(folder: Path, content: bytes) -> None:
    path = folder / "steps.bin"
    for start in (b"", new_log({})[:8], new_log({})):
        path.write_bytes(start + content)
        log = accepted(lambda: read_log(path))
        assert log is None or log.steps >= 0


# --- checkpoints ---------------------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=100), st.data())
def test_checkpoint_that_is_damaged(folder: Path, content: bytes, data: st.DataObject) -> None:
    """Cut anywhere, or with any byte changed, be it in its files or in its seal: it is refused."""
    checkpoint, run = folder / "out" / "checkpoint-4", {"seed": 0, "model": "a"}
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(content)
    seal(checkpoint, run)
    assert last_checkpoint(folder / "out", run) == checkpoint
    path = checkpoint / data.draw(st.sampled_from(["optimizer.pt", "seal.json"]))
    whole = path.read_bytes()
    place, change = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    path.write_bytes(whole[:place] + (b"" if change == 0 else bytes([whole[place] ^ change]) + whole[place + 1 :]))
    if path.name == "optimizer.pt":
        with pytest.raises(UserError, match=r"optimizer\.pt is damaged"):
            last_checkpoint(folder / "out", run)
    else:
        accepted(lambda: last_checkpoint(folder / "out", run))
