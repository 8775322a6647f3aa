"""``--resume``: an interrupted run ends as if it had not been interrupted."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from .conftest import Outcome
from .test_config import assert_same


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "agzo", "--lr", "1e-3"),
        ("--method", "agzo", "--lr", "1e-3", "--dtype", "bfloat16", "--compute-dtype", "float32"),
        ("--method", "zo-act", "--schedule", "linear"),
        ("--method", "guided"),
        ("--method", "guided", "-o", "attention=true", "-o", "train_bases=true"),
        ("--method", "guided", "--objective", "accuracy"),
        ("--method", "lozo-m", "--accumulate", "2", "--lr", "1e-4"),
        ("--method", "fo-adamw", "--lr", "1e-3"),
        ("--method", "lora"),
    ],
)
def test_bit_for_bit(
    flags: tuple[str, ...],
    train: Callable[..., Outcome],
    zoft: Callable[..., Outcome],
    interrupt: Callable[[int], None],
    tmp_path: Path,
) -> None:
    """24 rows in batches of 8: interrupted in the second epoch, and resumed within it."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(*flags, "--save-steps", 4, out=whole, steps=10).code == 0
    interrupt(5)
    stopped = train(*flags, "--save-steps", 4, out=resumed, steps=10)
    assert stopped.code != 0 and f"zoft train --resume {resumed}" in stopped.err
    assert not (resumed / "summary.json").exists()
    assert zoft("train", "--resume", resumed).code == 0
    assert_same(whole, resumed)

    one, other = (json.loads((out / "summary.json").read_text()) for out in (whole, resumed))
    for name in ("steps", "forwards", "initial", "final", "best", "best_step", "examples_seen"):
        assert one[name] == other[name], name
    lines = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "eval_accuracy" in line]
    assert steps == [0, 2, 4, 6, 8, 10]
    peaks = [line["peak_memory_bytes"] for line in lines]
    assert peaks == sorted(peaks) and other["peak_memory_bytes"] >= peaks[-1] > 2**20
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and other["seconds"] >= seconds[-1] - 1e-3


@pytest.mark.parametrize("stop", [13, 30])  # and resumed from step 8, before it went back, or 24, after that
@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "mezo", "--lr", "0.1", "--schedule", "linear"),
        ("--method", "zo-act", "--lr", "1e19"),
        ("--method", "fo-adamw", "--lr", "10", "--schedule", "cosine"),
    ],
)
def test_run_that_went_back(
    flags: tuple[str, ...],
    stop: int,
    train: Callable[..., Outcome],
    zoft: Callable[..., Outcome],
    interrupt: Callable[[int], None],
    tmp_path: Path,
) -> None:
    """A resumed run goes back where the whole one did, or has done so already, and goes on at the reduced rate."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = (*flags, "--guard", "--eval-steps", "8", "--save-steps", "8")
    assert train(*flags, out=whole, steps=48).code == 0
    interrupt(stop)
    assert train(*flags, out=resumed, steps=48).code != 0
    assert zoft("train", "--resume", resumed).code == 0
    assert_same(whole, resumed)
    logs = [[json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, resumed)]
    events, again = ([(line["step"], line["guard"]) for line in log if "guard" in line] for log in logs)
    assert events == again != []


def test_more_steps(train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    """With a fixed set of training rows, a run that is lengthened is the longer run."""
    flags = ("--method", "agzo", "--lr", "1e-3", "--save-steps", 2, "--train-examples", 20)
    assert train(*flags, out=tmp_path / "long", steps=8).code == 0
    assert train(*flags, out=tmp_path / "run", steps=4).code == 0
    assert zoft("train", "--resume", tmp_path / "run", "--steps", 8, "--json").json()["steps"] == 8
    assert_same(tmp_path / "long", tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 8


def test_moved_run(train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    """A run goes on where it lies now, with the best model of before it was moved."""
    flags = ("--method", "fo-adamw", "--lr", "0.05", "--save-steps", 4, "--json")
    best = train(*flags, steps=8, out=tmp_path / "before").json()
    (tmp_path / "before").rename(tmp_path / "after")
    again = zoft("train", "--resume", tmp_path / "after", "--json").json()
    assert (again["best"], again["best_step"]) == (best["best"], best["best_step"])
    assert not (tmp_path / "before").exists()


def test_interrupted_before_the_first_checkpoint(
    train: Callable[..., Outcome], zoft: Callable[..., Outcome], interrupt: Callable[[int], None], tmp_path: Path
) -> None:
    assert train(out=tmp_path / "whole").code == 0
    interrupt(1)
    assert train().code != 0
    assert zoft("train", "--resume", tmp_path / "run").code == 0
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_finished_run_without_checkpoints(
    train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert train().code == 0
    outcome = zoft("train", "--resume", tmp_path / "run", "--steps", 8)
    assert outcome.code == 2 and "--save-steps" in outcome.err


def test_settings_are_the_runs(train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    assert train("--save-steps", 2).code == 0
    outcome = zoft("train", "--resume", tmp_path / "run", "--seed", 0)
    assert outcome.code == 2 and "leave out seed" in outcome.err
