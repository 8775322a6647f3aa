"""The run log while a run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.errors import UserError
from zoft.optim import ZeroOrder
from zoft.train.identity import require_same
from zoft.train.steplog import (
    BACK,
    BASES,
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

LOG = "steps.bin"


class StepLog(TrainerCallback):
    """Writes every step of `optimizer` into ``steps.bin`` of the run folder, before it is taken.

    `run` is the run's identity. Bases that come from activations once are part of the log, since no noise makes them
    again.
    """

    def __init__(self, out: Path, optimizer: ZeroOrder, run: dict[str, Any]) -> None:
        self.path, self._optimizer, self._run = out / LOG, optimizer, run
        self._names = names_of(optimizer)
        subspace: Any = optimizer.subspace
        self._lacks_bases = subspace.from_activations and subspace.renew_every is None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run takes the steps after its checkpoint again; a log that an earlier version lacked begins here.

        Raises:
            UserError: the log is of another run, or damaged before the checkpoint.
        """
        if state.global_step == 0 or not self.path.is_file():
            aside = self.path.with_suffix(".tmp")
            aside.write_bytes(new_log(self._run))
            os.replace(aside, self.path)
            return
        log = read_log(self.path)
        run = json.loads(log.last(RUN) or b"{}")
        require_same(self._run, run, self.path)
        if log.steps < state.global_step:
            raise UserError(
                f"{self.path} is damaged after step {log.steps}, and the checkpoint is of step {state.global_step}: "
                "move the log away to go on without its steps so far"
            )
        kept = log.until(state.global_step)
        os.truncate(self.path, kept.records[-1].end)
        if run != self._run:
            append(self.path, RUN, write_run(self._run))
        self._lacks_bases = self._lacks_bases and kept.last(BASES) is None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        optimizer = self._optimizer
        if self._lacks_bases and optimizer.bases:
            whole = torch.contiguous_format
            bases = {
                m.name: optimizer.bases[m.name].cpu().clone(memory_format=whole) for m in optimizer.branches.active
            }
            append(self.path, BASES, save(bases))  # cloned, as layers may share one
            self._lacks_bases = False
        step = Step(optimizer.counters.steps, optimizer.param_groups[0]["lr"], optimizer.traces)
        append(self.path, STEP, write_step(step, self._names))

    def went_back(self, at: int, to: int) -> None:
        """After `at` steps the run has gone back to what it was after `to` of them."""
        append(self.path, BACK, write_back(Back(at, to)))
