"""Leaving cleanly: Ctrl-C and SIGTERM end a run after the step at hand, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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
        if self._signal is not None:
            raise Stopped(self._signal)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._signal is not None:
            control.should_save = control.should_training_stop = True

    def _hear(self, number: int, _: Any) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        self._console.print("stopping after this step, with a checkpoint; once more to stop at once")
