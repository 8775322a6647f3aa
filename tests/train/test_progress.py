"""What a run shows on the terminal while it goes on."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState

import zoft.train.callbacks
from zoft.train.callbacks import LiveProgress, RunLog


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_cut(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoft.train.callbacks, "peak_memory_bytes", lambda device: 3 * 2**29)
    console = Console(file=io.StringIO(), width=width)
    log = RunLog(tmp_path / "metrics.jsonl", lambda step: 2 * step, torch.device("cpu"))
    log.seconds = 1000.0
    progress, state = LiveProgress(console, "exact_match", log), TrainerState(max_steps=10000, global_step=1640)
    moment: Any = (SimpleNamespace(device=None), state, TrainerControl())
    progress.on_train_begin(*moment)
    progress.on_step_end(*moment)
    progress.on_log(*moment, logs={"eval_exact_match": 0.6821})
    progress.on_log(*moment, logs={"loss": 0.5574, "projected_grad": -1.958})
    progress.stop()

    evaluated, bar, *facts = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert evaluated == "step 1640: dev exact_match 0.682"
    assert bar.split()[0] == "training" and set(bar.split()[1]) == {"━"}
    assert " ".join(bar.split()[2:]) == "1640/10000 1.64 steps/s left -:--:--"
    whole = "loss 0.557 · dev exact_match 0.682 · g -1.96 · peak 1.5 GiB · 3280 forwards"
    assert " ".join(" ".join(facts).split()) == whole
    assert len(facts) == (1 if width >= 80 else 2)
