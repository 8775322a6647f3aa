"""A small suite, and processes that are played instead of run."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import zoft.bench.process
from zoft.bench.accuracy import Results, run_suite
from zoft.bench.suite import load_suite

SUITE: dict[str, Any] = {
    "model": "tiny",
    "tasks": ["sst2"],
    "methods": {"agzo": {"lr": 1e-4}},
    "budget": {"forwards": 600},
    "seeds": [0, 1],
}


@pytest.fixture
def results(tmp_path: Path) -> Callable[..., Results]:
    """The results of SUITE with some of it changed, in a folder that stays the same."""

    def make(**changed: Any) -> Results:
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump(SUITE | changed))
        return Results(load_suite(path), tmp_path / "out")

    return make


class Runs:
    """Stands in for the processes: the settings of each, and what its run leaves behind."""

    def __init__(self) -> None:
        self.settings: list[dict[str, Any]] = []
        self.commands: list[list[str]] = []
        self.dev: Callable[[dict[str, Any]], float] = lambda settings: 0.7 if settings["lr"] == 1e-4 else 0.6
        self.ends: Callable[[dict[str, Any]], tuple[int, str]] = lambda settings: (0, "")

    @property
    def rates(self) -> list[tuple[float, int]]:
        return [(settings["lr"], settings["seed"]) for settings in self.settings if "lr" in settings]

    def __call__(self, command: list[str], _: Any) -> subprocess.CompletedProcess[str]:
        words = command[3:]
        self.commands.append(words)
        if words[1] == "--resume":
            self.leave(Path(words[2]), yaml.safe_load((Path(words[2]) / "config.yaml").read_text()))
            return subprocess.CompletedProcess(command, 0, "", "")
        if words[0] == "eval":
            self.settings.append({"seed": int(words[words.index("--seed") + 1])})
            found = {"metric": "accuracy", "accuracy": 0.5, "peak_memory_bytes": 2**30, "seconds": 9.0}
            return subprocess.CompletedProcess(command, 0, json.dumps(found), "")
        settings = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
        self.settings.append(settings)
        code, last = self.ends(settings)
        if code == 0:
            self.leave(Path(words[words.index("--out") + 1]), settings)
        return subprocess.CompletedProcess(command, code, "", last)

    def leave(self, run: Path, settings: dict[str, Any]) -> None:
        run.mkdir(exist_ok=True)
        dev, steps = self.dev(settings), settings["steps"]
        summary = {"metric": "accuracy", "initial": 0.5, "best": dev + 0.01, "best_dev": dev, "steps": steps}
        summary |= {"forwards": 2 * steps, "seconds": 60.0 + settings["seed"], "peak_memory_bytes": 2**30}
        (run / "summary.json").write_text(json.dumps(summary))
        lines = [
            {"step": 0, "forwards": 0, "seconds": 0.0, "eval_accuracy": 0.5},
            {"step": 1, "forwards": 2, "seconds": 0.2, "loss": 0.3},
            {"step": steps, "forwards": 2 * steps, "seconds": 60.0 + settings["seed"], "eval_accuracy": dev},
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    played = Runs()
    monkeypatch.setattr(zoft.bench.process, "_ended", played)
    return played


def go(results: Results, *only: str, data: Path | None = None) -> None:
    run_suite(results, data, only or ["*"], Console(quiet=True))


def files(results: Results) -> set[str]:
    """Whatever lies in the results' folder."""
    return {str(path.relative_to(results.out)) for path in results.out.rglob("*") if path.is_file()}
