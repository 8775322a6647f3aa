"""Noticing that training goes wrong, and saying so in words, with the remedy.

Two kinds of trouble show in what training computes anyway: it diverges (`zoft.train.divergence`), or the loss stands
still under the probes. Estimates that are all noise do not show: how far rounding moves a loss depends on the whole
network, so that at one distance eps a rounded difference looks like a true one; ``zoft doctor`` compares distances. And
no update is lost in rounding: half-precision weights are rounded stochastically (`zoft.optim.write`), coefficients and
the weights of first-order methods are float32.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from zoft.train.callbacks import RunLog, StepLog
from zoft.train.divergence import RECENT, History
from zoft.train.guard import CUT, Guard
from zoft.train.trainer import ZOTrainer

CUTS = 5  # of the learning rate, before the run is ended


class Watch(TrainerCallback, ExportableState):
    """Says once, on the console and in the log, that training diverges or that the estimates are zero.

    With `guard`, a run that diverges goes back to its last good state and on with a third of the learning rate, five
    times at most; then it ends. What is watched is part of a checkpoint: a resumed run goes back where the whole one
    does.
    """

    def __init__(
        self, trainer: ZOTrainer, console: Console, log: RunLog, guard: bool, steps: StepLog | None = None
    ) -> None:
        self._trainer, self._console, self._log = trainer, console, log
        self._guard = Guard(trainer, steps) if guard else None
        self._history, self._cuts = History(), 0
        self._zero = 0  # what the optimizer has counted so far
        self._said: set[str] = set()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"history": asdict(self._history), "cuts": self._cuts}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        states: Any = state.stateful_callbacks  # by class name: of the checkpoint, or as `state` gave them just now
        found = states.setdefault(type(self).__name__, self.state())["attributes"]
        self._history, self._cuts = History(**found["history"]), found["cuts"]
        self._zero = self._zeros()
        control.should_training_stop = self._cuts > CUTS
        if self._guard is not None and state.global_step == 0:
            self._guard.keep_initial()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        before, self._zero = self._zero, self._zeros()
        still = self._zero - before >= args.gradient_accumulation_steps
        self._history.add(float(self._trainer.batch_loss), still)
        divergence = self._history.divergence()
        if divergence is not None:
            self._diverges(state.global_step, *divergence, control)
        elif self._history.never_finite:
            remedy = "start again with --dtype float32" if self._is_half else "look into the model and the data"
            self._warn("never finite", state.global_step, f"no loss was finite so far. Better {remedy}")
        elif self._history.mostly_still:
            self._stands_still(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """In a run shorter than what is looked at, the steps that there were have to do."""
        still = self._history.still
        if 0 < len(still) < RECENT and sum(still) >= len(still) / 2:
            self._stands_still(state.global_step)

    def _diverges(self, step: int, fact: str, steps: int, control: TrainerControl) -> None:
        if self._guard is None:
            remedy = f"start again with {self._smaller_rate}, or with --guard"
            self._warn("divergence", step, f"training diverges: {fact}. Better {remedy}")
        else:
            done = self._guard.back_off(step - steps)
            self._history, self._cuts = History(), self._cuts + 1
            control.should_evaluate = True  # the start may be the best there will be
            if self._cuts > CUTS:
                control.should_training_stop = True
                done += f"; this is the {self._cuts}th time, and the run ends"
            self._log.write(step, {"guard": done})
            self._say(step, f"training diverges: {fact}; {done}")

    def _stands_still(self, step: int) -> None:
        optimizer = self._trainer.zero_order
        assert optimizer is not None
        still = self._history.still
        fact = f"the loss did not change under the probes in {sum(still)} of the last {len(still)} steps"
        remedy = f"start again with a larger --eps, such as {10 * optimizer.param_groups[0]['eps']:.2g}"
        remedy += ", or with --dtype float32" * self._is_half
        if not still[0] and self._history.may_saturate:
            remedy += f", or with {self._smaller_rate}"
        self._warn("zero", step, f"{fact}. Better {remedy}")

    @property
    def _smaller_rate(self) -> str:
        scheduler = self._trainer.lr_scheduler
        assert scheduler is not None
        return f"a third of the learning rate, --lr {scheduler.base_lrs[0] / CUT:.2g}"

    @property
    def _is_half(self) -> bool:
        """Whether weights are held in half precision."""
        model: Any = self._trainer.model
        return any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())

    def _zeros(self) -> int:
        return self._trainer.zero_order.counters.zero if self._trainer.zero_order else 0

    def _warn(self, kind: str, step: int, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._log.write(step, {"warning": text})
            self._say(step, text)

    def _say(self, step: int, text: str) -> None:
        self._console.print(f"step {step}: {text}", style="yellow", soft_wrap=True, markup=False)
