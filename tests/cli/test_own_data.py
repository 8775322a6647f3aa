"""The user's own files."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Outcome

FEW = ("--steps", 2, "--eval-steps", 2, "--batch-size", 8, "--device", "cpu")


def test_prompts_and_completions(
    zoft: Callable[..., Outcome],
    model: Path,
    write: Callable[[Path, list[dict[str, Any]]], Path],
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"what comes after {i}?", "completion": str(i + 1)} for i in range(30)]
    file, out = write(tmp_path / "my.jsonl", rows), tmp_path / "run"
    summary = zoft("train", model, "--data", file, *FEW, "--out", out, "--json").json()
    assert (summary["task"], summary["metric"]) == ("custom", "exact_match")
    assert summary["examples"] == {"train": 16, "dev": 5, "validation": 3}
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert zoft("eval", out, "--json").json()["exact_match"] == summary["best"]


def test_labelled_table(zoft: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "my.csv", tmp_path / "run"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "score"])
        writer.writerows([f'a "{("dull", "fine")[i % 2]}" film, number {i}', i % 2] for i in range(30))
    task = ("--template", "{text} It was", "--words", "0=bad,1=good", "--label", "score")
    summary = zoft("train", model, "--data", file, *task, *FEW, "--out", out, "--json").json()
    assert (summary["task"], summary["metric"]) == ("custom", "accuracy")
    assert zoft("eval", out, "--json").json()["accuracy"] == summary["best"]


@pytest.mark.parametrize("metric", ["f1", "number_match"])
def test_metric(metric: str, zoft: Callable[..., Outcome], model: Path, write: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl", [{"q": f"{i} plus 1?", "a": [str(i + 1), "one more"]} for i in range(20)])
    task = ("--template", "{q}", "--label", "a", "--metric", metric)
    assert zoft("eval", model, "--data", file, *task, "--json").json()["metric"] == metric
