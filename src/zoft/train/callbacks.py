"""What a run shows and writes while it goes on."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from safetensors.torch import save
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.errors import UserError
from zoft.numbers import finite
from zoft.optim import ZeroOrder, obstacle
from zoft.optim.ranks import Ranks
from zoft.train.files import write_bytes
from zoft.train.identity import require_same
from zoft.train.memory import peak_memory_bytes
from zoft.train.steplog import (
    BACK,
    BASES,
    LOG,
    RUN,
    STEP,
    Back,
    Step,
    append,
    names_of,
    new_log,
    read_log,
    write_back,
    write_run,
    write_step,
)

NOISE = ("_runtime", "_per_second", "_preparation_time", "grad_norm", "epoch")  # of transformers' log lines


class RunLog(TrainerCallback):
    """Appends every log line to ``metrics.jsonl``, with the forwards, the seconds and the peak memory up to it.

    `seconds` counts training steps only, without evaluations and saving. The forwards are of zeroth-order
    training; a first-order step counts as three (its forward, and a backward of about two). Of several processes one
    `writes`.
    """

    def __init__(self, path: Path, forwards: Any, device: torch.device, writes: bool = True) -> None:
        self.path, self.forwards, self._device, self._writes = path, forwards, device, writes
        self.seconds = 0.0
        self._started = 0.0
        self._peak = 0  # of the processes before this one

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory the run has held, in any of its processes."""
        return max(self._peak, peak_memory_bytes(self._device))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run goes on from the last line of its checkpoint; what was logged after it happens again."""
        texts = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        kept = [text for text in texts if _step(text) <= state.global_step]
        if kept:
            last = json.loads(kept[-1])
            self.seconds, self._peak = last["seconds"], last.get("peak_memory_bytes", 0)  # earlier versions noted none
        if self._writes:
            write_bytes(self.path, b"".join(kept))

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
        if not self._writes:
            return
        facts = finite({name: value for name, value in values.items() if not name.endswith(NOISE)})
        cost = {"seconds": round(self.seconds, 3), "peak_memory_bytes": self.peak_memory_bytes}
        line = {"step": step, "forwards": self.forwards(step)} | cost | facts
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class StepLog(TrainerCallback):
    """Writes every step of `optimizer` into ``steps.bin`` of the run folder, before it is taken.

    `run` is the run's identity. Bases that come from activations once are part of the log, since no noise makes them
    again.
    """

    def __init__(self, out: Path, optimizer: ZeroOrder, run: dict[str, Any]) -> None:
        self.path, self._optimizer, self._run = out / LOG, optimizer, run
        self._names = names_of(optimizer)
        self._lacks_bases = optimizer.subspace.from_activations and obstacle(optimizer) is None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run takes the steps after its checkpoint again; a log that an earlier version lacked begins here.

        Raises:
            UserError: the log is of another run, or damaged before the checkpoint.
        """
        if state.global_step == 0 or not self.path.is_file():
            write_bytes(self.path, new_log(self._run))
            return
        log = read_log(self.path)
        require_same(self._run, log.run, self.path)
        if log.steps < state.global_step:
            raise UserError(
                f"{self.path} is damaged after step {log.steps}, and the checkpoint is of step {state.global_step}: "
                "move the log away to go on without its steps so far"
            )
        kept = log.until(state.global_step)
        os.truncate(self.path, kept.records[-1].end)
        if log.run != self._run:
            append(self.path, RUN, write_run(self._run))
        self._lacks_bases = self._lacks_bases and kept.last(BASES) is None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        optimizer = self._optimizer
        if self._lacks_bases and optimizer.bases:
            bases = {m.name: optimizer.bases[m.name].cpu() for m in optimizer.branches.active}
            whole = {name: basis.clone(memory_format=torch.contiguous_format) for name, basis in bases.items()}
            append(self.path, BASES, save(whole))  # cloned, as layers may share one
            self._lacks_bases = False
        step = Step(optimizer.counters.steps, optimizer.param_groups[0]["lr"], optimizer.traces)
        append(self.path, STEP, write_step(step, self._names))

    def went_back(self, at: int, to: int) -> None:
        """After `at` steps the run has gone back to what it was after `to` of them."""
        append(self.path, BACK, write_back(Back(at, to)))


class Clock(TrainerCallback):
    """Ends training once `log` has counted `limit` seconds of it, and evaluates every `interval` seconds and then.

    None for no end, or no evaluation on the way. It has to be called after `log`. Processes go by their mean.
    """

    def __init__(self, log: RunLog, limit: float | None, interval: float | None) -> None:
        self._log = log
        self._limit, self._interval = limit or math.inf, interval or math.inf
        self._passed = 0  # intervals

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        ranks = Ranks()
        seconds = float(ranks.sum(torch.tensor(self._log.seconds))) / ranks.count
        passed = int(seconds / self._interval)
        ended = seconds >= self._limit
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
        self._facts["memory"] = f"peak {self._log.peak_memory_bytes / 2**30:.1f} GiB"
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
