"""``--objective``: training for a metric of the task itself, by probes or by its expected value."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Outcome


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("flags", [(), ("--words", "0=quite terrible,1=great")])
def test_accuracy(
    flags: tuple[str, ...], zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path
) -> None:
    """The loss is the share of the batch that is predicted wrongly."""
    own = ("--template", "{sentence} It was", "--label", "label", *flags) if flags else ("--task", "sst2")
    config = tmp_path / "log.yaml"
    config.write_text("log_steps: 1\n")
    done = zoft(
        "train", model, "--config", config, *own, "--data", data, "--objective", "accuracy", "--method", "zo-act",
        "--eps", "0.3", "--steps", 6, "--batch-size", 8, "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert done.json()["forwards"] == 12
    found = losses(tmp_path / "run")
    assert len(found) == 6 and 0 < max(found) <= 1
    assert all((loss * 8).is_integer() for loss in found)


def test_generated_text(
    zoft: Callable[..., Outcome], model: Path, write: Callable[[Path, list[dict[str, Any]]], Path], tmp_path: Path
) -> None:
    """The loss is one minus the F1 of what is generated; every probe generates anew."""
    rows = [{"prompt": f"{word} It was", "completion": " great"} for word in ("fine", "dull", "a film", "tea") * 6]
    data = write(tmp_path / "rows.jsonl", rows)
    done = zoft(
        "train", model, "--data", data, "--metric", "f1", "--objective", "f1", "--method", "agzo", "--eps", "0.3",
        "--steps", 2, "--batch-size", 4, "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert done.json()["forwards"] == 4


@pytest.mark.parametrize("method", ["auto", "guided", "fo-adamw", "lora"])
@pytest.mark.parametrize("words", [None, "0=quite terrible,1=quite great"])
def test_methods_that_take_a_slope_train_for_the_expected_accuracy(
    method: str, words: str | None, zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path
) -> None:
    """The loss is the probability of what is wrong, and falls; once these methods were refused."""
    own = ("--template", "{sentence} It was", "--label", "label", "--words", words) if words else ("--task", "sst2")
    config = tmp_path / "log.yaml"
    config.write_text("log_steps: 1\n")
    done = zoft(
        "train", model, "--config", config, *own, "--data", data, "--objective", "accuracy", "--method", method,
        "--lr", "0.01", "--steps", 12, "--batch-size", 8, "--dtype", "float32", "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert done.json()["forwards"] == (36 if method in ("fo-adamw", "lora") else 12)
    found = losses(tmp_path / "run")
    assert all(0 < loss < 1 for loss in found) and sum(found[-3:]) < sum(found[:3])


@pytest.mark.parametrize("method", ["guided", "fo-adamw"])
def test_answers_are_drawn_where_they_are_generated(
    method: str,
    zoft: Callable[..., Outcome],
    model: Path,
    write: Callable[[Path, list[dict[str, Any]]], Path],
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"{word} It was", "completion": " great"} for word in ("fine", "dull", "a film", "tea") * 6]
    done = zoft(
        "train", model, "--data", write(tmp_path / "rows.jsonl", rows), "--objective", "exact_match", "--method",
        method, "--lr", "0.01", "--steps", 2, "--batch-size", 4, "--max-new-tokens", 3, "--samples", 2,
        "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert done.json()["steps"] == 2
    assert all((loss * 16).is_integer() for loss in losses(tmp_path / "run"))  # 2 steps, 4 prompts, 2 answers


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--objective", "acuracy", "--method", "agzo"), "did you mean accuracy?"),
        (("--objective", "accuracy", "--method", "agzo", "--eps", "auto"), "neither lr nor eps to auto"),
        (("--objective", "accuracy", "--samples", "1"), "samples must be at least 2"),
        (("--max-new-tokens", "4"), "max_new_tokens is of generated answers; SST-2 has none"),
    ],
)
def test_mistakes(flags: tuple[str, ...], said: str, train: Callable[..., Outcome]) -> None:
    done = train(*flags)
    assert done.code == 2 and said in done.err


def test_nothing_has_moved_yet(train: Callable[..., Outcome]) -> None:
    """Probes so short that no prediction changes: the coefficients stay zero, and are saved."""
    done = train("--objective", "accuracy", "--method", "zo-act", "--eps", "1e-9", "--json")
    assert done.json()["zero"] == done.json()["steps"] == 4
