"""``zoft train`` as several processes: one run, whose result is that of one process; one that dies stops the others."""

import json
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from forks import Command
from train.tiny import reviews
from zoft.train.task_trainer import TaskTrainer

from .conftest import Outcome, write_rows

FEW = ("--task", "sst2", "--steps", 6, "--eval-steps", 2, "--save-steps", 2, "--batch-size", 7)
FEW += ("--dtype", "float32", "--device", "cpu", "--lr", "1e-2")


class Sent(NamedTuple):
    """A signal that a process sends itself at a step."""

    number: int
    rank: int
    step: int


def signalled(sent: Sent) -> None:
    before = TaskTrainer.training_step

    def training_step(self: TaskTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == sent.step:
            os.kill(os.getpid(), sent.number)
        return before(self, *args, **options)

    TaskTrainer.training_step = training_step  # type: ignore[method-assign]


def together(count: int, *args: object, sent: Sent | None = None) -> list[Outcome]:
    """``zoft train`` in `count` processes, to one of which a signal may be `sent`.

    {rank} in an argument becomes a process's number.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for rank in (str(number) for number in range(count)):
            own = ["train", *(str(part).replace("{rank}", rank) for part in args)]
            before = partial(signalled, sent) if sent is not None and rank == str(sent.rank) else None
            commands.append(Command(own, shared | {"RANK": rank, "LOCAL_RANK": rank}, Path(folder) / rank, before))
        return [Outcome(*command.ended()) for command in commands]


@pytest.fixture
def arguments(model: Path, data: Path) -> tuple[object, ...]:
    return (model, "--data", data, *FEW)


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    unlike = ("seconds", "peak_memory_bytes", "loss")  # which is the mean since the run was resumed
    return [{name: value for name, value in line.items() if name not in unlike} for line in found]


def assert_near(one: Path, other: Path) -> None:
    """The same run, but for rounding."""
    for mine, theirs in zip(lines(one), lines(other), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    (mine, theirs) = (load_file(next(folder.glob("*/*model.safetensors"))) for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", [("guided",), ("agzo",), ("lozo", "-o", "probes=2", "-o", "parallel=probes")])
def test_they_are_one_run(
    method: tuple[str, ...], arguments: tuple[object, ...], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    first, second = together(2, *arguments, "--method", *method, "--out", two, "--json")
    assert second.code == 0, second.err
    assert (second.out, first.json()["steps"]) == ("", 6)
    assert zoft("train", *arguments, "--method", *method, "--out", one).code == 0
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    if method[0] == "lozo":  # which has the centre on both, and half of the points: other counts of forwards
        assert lines(two)[-1]["forwards"] < lines(one)[-1]["forwards"]
        again = tmp_path / "again"
        assert zoft("replay", two, "--to-step", first.json()["best_step"], "--out", again).code == 0
        files = ((folder / "model.safetensors").read_bytes() for folder in (again, two / "model"))
        assert len(set(files)) == 1
    else:
        assert_near(two, one)


def test_one_that_dies_stops_the_others(
    arguments: tuple[object, ...], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    arguments = (*arguments, "--method", "agzo")
    first, second = together(2, *arguments, "--out", out, sent=Sent(signal.SIGKILL, rank=1, step=3))
    assert second.code == -signal.SIGKILL
    assert first.code == 2 and first.err.count("\n") == 1 and "another process of this run has ended" in first.err
    assert f"zoft train --resume {out}" in first.err
    assert zoft("train", "--resume", out).code == 0
    assert zoft("train", *arguments, "--out", whole).code == 0
    assert_near(out, whole)


def test_a_signal_to_one_stops_all(arguments: tuple[object, ...], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    arguments = (*arguments, "--method", "agzo")
    stopped = together(2, *arguments, "--out", out, sent=Sent(signal.SIGTERM, rank=1, step=2))
    assert [one.code for one in stopped] == [128 + signal.SIGTERM] * 2
    assert f"zoft train --resume {out}" in stopped[0].err and stopped[1].err == ""
    assert (out / "checkpoint-3" / "seal.json").is_file()
    assert all(one.code == 0 for one in together(3, "--resume", out))
    assert zoft("train", *arguments, "--out", whole).code == 0
    assert_near(out, whole)


def test_what_cannot_be(arguments: tuple[object, ...], tmp_path: Path) -> None:
    for refused in together(2, *arguments, "--method", "mezo", "-o", "parallel=3", "--out", tmp_path / "run"):
        assert refused.code == 2 and refused.err.count("\n") == 1
        assert "2 processes cannot form 3 groups of one size" in refused.err
    assert not (tmp_path / "run").exists()


def test_unlike_data(model: Path, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_rows(tmp_path / str(rank) / "train.jsonl", reviews(30 + rank))
        write_rows(tmp_path / str(rank) / "validation.jsonl", reviews(9))
    for refused in together(2, model, *FEW, "--data", tmp_path / "{rank}", "--out", tmp_path / "run"):
        assert refused.code == 2 and "the processes of this run differ in rows" in refused.err
    assert not (tmp_path / "run").exists()
