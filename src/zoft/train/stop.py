"""Leaving cleanly: Ctrl-C and SIGTERM end a run after the step at hand, with a checkpoint."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.optim.ranks import Ranks

ECHO = 0.5  # seconds: torchrun passes a Ctrl-C on to processes that have heard it already


class Stopped(KeyboardInterrupt):
    """The run has ended early, on `signal`; its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class Stop(TrainerCallback):
    """Ends training after the step (and its evaluation) in which a signal has come; at once on a second one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._signal: int | None = None
        self._first = math.inf  # when it came

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Listen during the block; raises `Stopped` at its end if a signal has come."""
        if threading.current_thread() is not threading.main_thread():  # the only one that hears signals
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._heard():
            raise Stopped(self._signal or signal.SIGTERM)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._heard():
            control.should_save = control.should_training_stop = True

    def _heard(self) -> bool:
        """Whether any process of the run has."""
        return Ranks().any(self._signal is not None)

    def _hear(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if now - self._first > (ECHO if Ranks().count > 1 else 0):
            raise KeyboardInterrupt
        if self._signal is not None:
            return
        self._signal, self._first = number, now
        self._console.print("stopping after this step, with a checkpoint; once more to stop at once")
