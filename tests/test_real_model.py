"""One short run of a real pretrained model, as a new user would start it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("method, settled, forwards", [("agzo", "agzo", 8), ("auto", "guided", 4)])
def test_a_pretrained_model_trains_on_the_bundled_sample(
    method: str, settled: str, forwards: int, tmp_path: Path
) -> None:
    """SmolLM2: losses stay those of a sane model, the summary is whole, the saved model evaluates the same.

    The adapter's run is in float32: PEFT adds its part with other roundings than training does, and in half precision
    the answer to a row may turn on one.
    """
    out, sample = tmp_path / "run", Path(__file__).parents[1] / "src/zoft/demo/squad"
    common = ["--task", "squad", "--data", str(sample), "--eval-examples", "4", "--json"]
    flags = [
        "--method",
        method,
        "--lr",
        "3e-5",
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--eval-steps",
        "4",
        "--dev-examples",
        "4",
        "--dtype",
        "float32" if method == "auto" else "bfloat16",
    ]
    summary = zoft("train", "demo", *common, *flags, "--out", str(out))
    assert (summary["method"], summary["forwards"], summary["skipped"], summary["zero"]) == (settled, forwards, 0, 0)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and all(math.isfinite(loss) and loss < 6 for loss in losses)
    again = zoft("eval", str(out), *[flag if flag != "--eval-examples" else "--examples" for flag in common])
    assert again["f1"] == pytest.approx(summary["best"], abs=0.01 if (out / "adapter").is_dir() else 0)


def zoft(*arguments: str) -> dict:
    """What a command with --json prints."""
    done = subprocess.run([sys.executable, "-m", "zoft", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
