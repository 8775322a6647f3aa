"""What a run shows and writes while it goes on."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.train.files import write_text
from zoft.train.memory import peak_memory_bytes

NOISE = ("_runtime", "_per_second", "_preparation_time", "grad_norm", "epoch")  # of transformers' log lines


class RunLog(TrainerCallback):
    """Appends every log line to ``metrics.jsonl``, with the forwards and the seconds of training up to it.

    `seconds` counts training steps only, without evaluations and saving. The forwards are of zeroth-order
    training; a first-order step counts as three (its forward, and a backward of about two).
    """

    def __init__(self, path: Path, forwards: Any) -> None:
        self.path, self.forwards = path, forwards
        self.seconds = 0.0
        self._started = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run goes on from the seconds of its checkpoint; what was logged after it happens again."""
        texts = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.is_file() else []
        kept = [text for text in texts if _step(text) <= state.global_step]
        if kept:
            self.seconds = json.loads(kept[-1])["seconds"]
        write_text(self.path, "".join(kept))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._started

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs = given["logs"]
        if "train_runtime" not in logs:  # transformers' closing summary; ours is summary.json
            self.write(state.global_step, logs)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; a number that JSON cannot hold becomes null."""
        facts = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
            if not name.endswith(NOISE)
        }
        line = {"step": step, "forwards": self.forwards(step), "seconds": round(self.seconds, 3), **facts}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class LiveProgress(TrainerCallback):
    """A progress bar: loss, projected gradient, metric, forwards, speed, time left, peak memory."""

    def __init__(self, console: Console, metric: str, log: RunLog) -> None:
        self._metric, self._log = f"eval_{metric}", log
        self._shown: dict[str, str] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.start()
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step, facts="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        speed = state.global_step / self._log.seconds if self._log.seconds else 0.0
        memory = peak_memory_bytes() / 2**30
        facts = [*self._shown.values(), f"{self._log.forwards(state.global_step)} forwards"]
        facts += [f"{speed:.2f} steps/s", f"{memory:.1f} GiB"]
        self._progress.update(self._task, completed=state.global_step, facts=" · ".join(facts))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs = given["logs"]
        for key, label in (("loss", "loss"), ("projected_grad", "g"), (self._metric, "dev " + self._metric[5:])):
            if key in logs:
                self._shown[key] = f"{label} {logs[key]:.3g}"
        if self._metric in logs:
            self._progress.console.print(f"step {state.global_step}: dev {self._metric[5:]} {logs[self._metric]:.3f}")

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


def _step(text: str) -> float:
    """The step of a line of the log; infinite for a line that an interrupted run has torn."""
    try:
        return json.loads(text)["step"]
    except ValueError:
        return math.inf
