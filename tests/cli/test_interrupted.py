"""A run that is killed, stopped, damaged or taken twice goes on as if nothing had been, or says in a line why not."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forks import spawn
from scripts import load
from train.tiny import TOKENIZER, make_model, reviews
from zoft.train.callbacks import RunLog
from zoft.train.checkpoints import alone
from zoft.train.task_trainer import TaskTrainer

from .conftest import Outcome, write_rows
from .test_bad_input import assert_refused
from .test_config import assert_same

SAVED = ("--method", "lozo", "--lr", "1e-3", "--save-steps", 2)


def kills(_: int, out: Path) -> None:
    sys.argv = ["kills.py", "--kills", "4", "--out", str(out)]
    load("benchmarks/kills.py").main()


def test_kills(tmp_path: Path) -> None:
    """``kill -9`` at random moments of several methods; benchmarks/kills.py compares with undisturbed runs."""
    spawn(kills, (tmp_path / "kills.json",), nprocs=1)
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["kills"] >= 4 and found["different"] == []


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def during(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any], again: bool = False) -> None:
    """Calls `act` at the end of a step, and with `again` of the next one."""
    before = RunLog.on_step_end

    def on_step_end(self: RunLog, args: Any, state: Any, control: Any, **given: Any) -> None:
        before(self, args, state, control, **given)
        if state.global_step in (step, step + again):
            act()

    monkeypatch.setattr(RunLog, "on_step_end", on_step_end)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [3, 4, 6])  # between evaluations, where one is due, and the last one
@pytest.mark.parametrize("flags", [SAVED, ("--method", "zo-act", "--lr", "1e-2")])
def test_a_signal_leaves_a_checkpoint(
    flags: tuple[Any, ...],
    step: int,
    number: int,
    train: Callable[..., Outcome],
    zoft: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(*flags, out=whole, steps=6).code == 0
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        during(patch, step, lambda: signal.raise_signal(number))
        stopped = train(*flags, out=out, steps=6)
    assert stopped.code == 128 + number
    assert "stopping after this step" in stopped.out and f"zoft train --resume {out}" in stopped.err
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (out / f"checkpoint-{step}" / "seal.json").is_file() and not (out / "summary.json").exists()
    assert zoft("train", "--resume", out).code == 0
    assert_same(whole, out)
    assert (out / "steps.bin").read_bytes() == (whole / "steps.bin").read_bytes()


def test_a_second_signal_leaves_at_once(
    train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    during(monkeypatch, 3, twice)
    assert train(*SAVED).code == 130
    assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_two_processes(train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(*SAVED).code == 0
    with alone(out):
        kept = snapshot(out)
        assert_refused(zoft("train", "--resume", out), "another process is at this run")
        assert snapshot(out) == kept
    with alone(tmp_path / "fresh"):
        assert_refused(train(out=tmp_path / "fresh"), "another process is at this run")
    assert not (tmp_path / "fresh").exists()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (lambda out: flip(out / "checkpoint-4" / "optimizer.pt"), "optimizer.pt is damaged"),
    "a cut file": (lambda out: os.truncate(out / "checkpoint-4" / "model.safetensors", 99), "safetensors is damaged"),
    "a lost file": (lambda out: (out / "checkpoint-4" / "trainer_state.json").unlink(), "state.json is missing"),
    "no seal to read": (lambda out: (out / "checkpoint-4" / "seal.json").write_text("{"), "seal.json is damaged"),
    "another format": (lambda out: sealed(out, format=2), "made by another version of zoft (3.0)"),
    "another run's log": (lambda out: shutil.copy(out.parent / "other" / "steps.bin", out), "its seed was 9, and now"),
    "a log of a later version": (lambda out: (out / "steps.bin").write_bytes(b"zoftlog\x09"), "another version"),
    "a log cut before the checkpoint": (lambda out: cut(out / "steps.bin", 90), "is damaged after step"),
    "a log that is none": (lambda out: (out / "steps.bin").write_bytes(b"x" * 900), "not a run log"),
    "a log without a beginning": (lambda out: flip(out / "steps.bin", 40), "damaged at its beginning"),
}


def flip(path: Path, place: int = -40) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def sealed(out: Path, **change: Any) -> None:
    path = out / "checkpoint-4" / "seal.json"
    seal = json.loads(path.read_text())
    path.write_text(json.dumps(seal | {"run": seal["run"] | {"zoft_version": "3.0"}} | change))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_said(
    damage: str, train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    """And nothing is lost: the files are what they were."""
    out, (act, message) = tmp_path / "run", DAMAGE[damage]
    assert train(*SAVED, "--seed", 9, out=tmp_path / "other").code == 0
    assert train(*SAVED).code == 0
    act(out)
    kept = snapshot(out)
    outcome = zoft("train", "--resume", out)
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome
    now = snapshot(out)
    assert {name for name in kept if now.get(name) != kept[name]} == set()


def test_the_checkpoint_before_a_damaged_one(
    train: Callable[..., Outcome],
    zoft: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Moved away, as the message says, it leaves the run what it was."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(*SAVED, out=whole, steps=6).code == 0
    with monkeypatch.context() as patch:
        during(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        assert train(*SAVED, out=out, steps=6).code == 143
    flip(out / "checkpoint-5" / "optimizer.pt")
    assert zoft("train", "--resume", out).code == 2
    shutil.move(out / "checkpoint-5", tmp_path / "away")
    assert zoft("train", "--resume", out).code == 0
    assert_same(whole, out)


def test_a_torn_tail_is_cut(train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    """Of the steps' log and of the metrics."""
    out = tmp_path / "run"
    assert train(*SAVED).code == 0
    kept = snapshot(out)
    for name, torn in (("steps.bin", b"\x27\0\0\0torn"), ("metrics.jsonl", b'{"step": 3, "forw')):
        with (out / name).open("ab") as file:
            file.write(torn)
    assert zoft("train", "--resume", out).code == 0
    assert (out / "steps.bin").read_bytes() == kept["steps.bin"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]


def test_a_line_that_lacks_its_end(train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    assert train(*SAVED).code == 0
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text()[:-1])
    assert zoft("train", "--resume", tmp_path / "run").code == 0
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_other_weights_and_other_rows(zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    model, rows, out = tmp_path / "model", tmp_path / "rows", tmp_path / "run"
    rows.mkdir()
    for name in ("train", "validation"):
        write_rows(rows / f"{name}.jsonl", reviews(30))
    make_model().save_pretrained(model)
    TOKENIZER.save_pretrained(model)
    few = ("--task", "sst2", "--data", rows, "--batch-size", 8, "--device", "cpu", "--steps", 4, "--eval-steps", 2)
    assert zoft("train", model, *few, *SAVED, "--out", out).code == 0
    write_rows(rows / "train.jsonl", reviews(31)[1:])
    assert_refused(zoft("train", "--resume", out), "the training rows are not those")
    write_rows(rows / "train.jsonl", reviews(30))
    other = make_model()
    other.model.norm.weight.data[0] += 1
    other.save_pretrained(model)
    assert_refused(zoft("train", "--resume", out), "the weights of the model are not those")


def test_a_run_of_an_earlier_version(
    train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    """It has neither seals nor a log of its steps: it goes on, and cannot be replayed."""
    out = tmp_path / "run"
    assert train(*SAVED, "--train-examples", 20).code == 0
    (out / "steps.bin").unlink()
    for seal in out.glob("checkpoint-*/seal.json"):
        seal.unlink()
    assert zoft("train", "--resume", out, "--steps", 6).code == 0
    assert_refused(zoft("replay", out), "after 0 of them comes number 4")


def test_a_run_that_has_given_up(train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    """Resumed after the last time that it went back, it does not go on."""
    out = tmp_path / "run"
    flags = ("--method", "zo-act", "--lr", 1e30, "--guard", "--eval-steps", 5, "--save-steps", 5, "--json")
    whole = train(*flags, steps=100).json()
    (out / "summary.json").unlink()
    again = zoft("train", "--resume", out, "--json").json()
    assert again["steps"] == whole["steps"] == 60
    assert (again["best"], again["best_step"]) == (whole["best"], whole["best_step"])
    assert zoft("replay", out, "--json").json()["steps"] == 60


def test_a_longer_run_is_one_log(train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    flags = (*SAVED, "--train-examples", 20)
    assert train(*flags, out=tmp_path / "run").code == 0
    assert zoft("train", "--resume", tmp_path / "run", "--steps", 8).code == 0
    assert zoft("replay", tmp_path / "run", "--json").json()["steps"] == 8


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 576 vs 534"), OSError(errno.ENOSPC, "No space left")])
def test_disk_full_in_a_checkpoint(
    error: Exception,
    train: Callable[..., Outcome],
    zoft: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """torch.save says it in its own way. The checkpoint before stays, and the run goes on from it."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(*SAVED, out=whole, steps=6).code == 0
    save = TaskTrainer._save_optimizer_and_scheduler

    with monkeypatch.context() as patch:

        def fail(self: TaskTrainer, folder: str) -> None:
            save(self, folder)
            if self.state.global_step == 4:
                full = shutil.disk_usage(folder)._replace(free=0)
                patch.setattr(shutil, "disk_usage", lambda _: full)
                raise error

        patch.setattr(TaskTrainer, "_save_optimizer_and_scheduler", fail)
        assert_refused(train(*SAVED, out=out, steps=6), "No space left")
    assert (out / "checkpoint-2").is_dir() and not (out / "checkpoint-4").exists()
    assert not (out / ".saving").exists()
    assert zoft("train", "--resume", out).code == 0
    assert_same(whole, out)
