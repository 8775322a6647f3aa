"""What a run shows and writes while it goes on."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
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
        texts = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        kept = [text for text in texts if _step(text) <= state.global_step]
        if kept:
            self.seconds = json.loads(kept[-1])["seconds"]
        write_text(self.path, b"".join(kept).decode())

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


class Clock(TrainerCallback):
    """Ends training once `log` has counted `limit` seconds of it, and evaluates every `interval` seconds and then.

    None for no end, or no evaluation on the way. It has to be called after `log`.
    """

    def __init__(self, log: RunLog, limit: float | None, interval: float | None) -> None:
        self._log = log
        self._limit, self._interval = limit or math.inf, interval or math.inf
        self._passed = 0  # intervals

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        passed = int(self._log.seconds / self._interval)
        ended = self._log.seconds >= self._limit
        if passed > self._passed or ended:
            control.should_evaluate = True
        if ended:
            control.should_training_stop = True
        self._passed = passed


class LiveProgress(TrainerCallback):
    """Two lines on the terminal: how far, how fast, how long still; under it, what the run has come to.

    They fit in 80 columns. On a narrower terminal the bar gives way, and the second line goes on in a third.
    """

    def __init__(self, console: Console, metric: str, log: RunLog) -> None:
        self._log = log
        self._labels = {"loss": "loss", f"eval_{metric}": f"dev {metric}", "projected_grad": "g"}
        self._facts = dict.fromkeys((*self._labels, "memory", "forwards"), "")  # in this order
        self._progress = Progress(
            "training",
            BarColumn(bar_width=None, table_column=Column(max_width=20)),
            MofNCompleteColumn(),
            "{task.fields[speed]:.3g} steps/s",
            "left",
            TimeRemainingColumn(),
            speed_estimate_period=600,  # seconds: a step of a large model, or an evaluation, may take minutes
        )
        self._live = Live(get_renderable=self._lines, console=console)

    def _lines(self) -> Group:
        return Group(self._progress, Text(" · ".join(filter(None, self._facts.values()))))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, speed=0.0)
        self._live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        speed = state.global_step / self._log.seconds if self._log.seconds else 0.0
        self._progress.update(self._task, completed=state.global_step, speed=speed)
        self._facts["memory"] = f"peak {peak_memory_bytes(args.device) / 2**30:.1f} GiB"
        self._facts["forwards"] = f"{self._log.forwards(state.global_step)} forwards"

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        for key in self._labels.keys() & given["logs"].keys():
            self._facts[key] = f"{self._labels[key]} {given['logs'][key]:.3g}"
            if key.startswith("eval_"):
                self._live.console.print(f"step {state.global_step}: {self._labels[key]} {given['logs'][key]:.3f}")

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._live.stop()
        if not self._live.console.is_interactive:
            self._live.console.print()  # in a file or a pipe the lines end without a line break


def _step(text: bytes) -> float:
    """The step of a line of the log; infinite for a line that an interrupted run has torn."""
    try:
        return json.loads(text)["step"] if text.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf
