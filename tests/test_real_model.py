"""One short run of a real pretrained model, as a new user would start it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_pretrained_model_trains_on_the_bundled_sample(tmp_path: Path) -> None:
    """SmolLM2, no method named: losses stay those of a sane model, the summary is whole, the run evaluates the same.

    In float32: PEFT adds its part with other roundings than training does, and in half precision the answer to a row
    may turn on one.
    """
    out, sample = tmp_path / "run", Path(__file__).parents[1] / "src/zoft/demo/squad"
    common = ["--task", "squad", "--data", str(sample), "--json"]
    few = ["--steps", "4", "--batch-size", "4", "--eval-steps", "4", "--dev-examples", "4", "--eval-examples", "4"]
    summary = zoft("train", "demo", *common, *few, "--lr", "3e-5", "--dtype", "float32", "--out", str(out))
    assert (summary["method"], summary["forwards"], summary["skipped"], summary["zero"]) == ("guided", 4, 0, 0)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and all(math.isfinite(loss) and loss < 6 for loss in losses)
    again = zoft("eval", str(out), *common, "--examples", "4")
    assert again["f1"] == pytest.approx(summary["best"], abs=0.01)


def zoft(*arguments: str) -> dict:
    """What a command with --json prints."""
    done = subprocess.run([sys.executable, "-m", "zoft", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
