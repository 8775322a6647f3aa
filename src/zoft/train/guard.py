"""Going back from trouble: to the last good state, and on with a smaller learning rate."""

from __future__ import annotations

from pathlib import Path

import torch

from zoft.train.callbacks import StepLog
from zoft.train.checkpoints import whole_folder
from zoft.train.processes import wait
from zoft.train.trainer import OPTIMIZER_STATE, ZOTrainer

INITIAL = "initial"  # folder beside the checkpoints
CUT = 3.0


class Guard:
    """Takes a run back to its best checkpoint of before the trouble, or if there is none to its initial state.

    Weights (or coefficients) and the optimizer's state go back; the counters go on, so that neither batches nor noise
    repeat themselves. Every later step's learning rate, whatever the schedule, is a third of what it would have been.
    The run log, `steps`, is told.
    """

    def __init__(self, trainer: ZOTrainer, steps: StepLog | None = None) -> None:
        self._trainer, self._steps = trainer, steps
        self._folder = Path(str(trainer.args.output_dir))

    def keep_initial(self) -> None:
        """Keep the initial state on the disk."""
        trainer = self._trainer
        assert trainer.optimizer is not None
        if trainer.args.should_save:
            with whole_folder(self._folder / INITIAL) as folder:
                if not trainer._saves_adapter:
                    trainer.save_model(str(folder))
                torch.save(trainer.optimizer.state_dict(), folder / OPTIMIZER_STATE)
        wait()

    def back_off(self, step: int) -> str:
        """Go back to a state of before `step`, cut the learning rate, and say both in words."""
        trainer, optimizer, scheduler = self._trainer, self._trainer.optimizer, self._trainer.lr_scheduler
        assert optimizer is not None and scheduler is not None
        zero_order, rates = trainer.zero_order, [group["lr"] / CUT for group in optimizer.param_groups]
        counters = zero_order and zero_order.counters
        to = self._go_back(step)
        if self._steps is not None:
            self._steps.went_back(trainer.state.global_step, to)
        if zero_order and counters:
            zero_order.counters = counters
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        old, new = scheduler.base_lrs, [rate / CUT for rate in scheduler.base_lrs]
        scheduler.load_state_dict(scheduler.state_dict() | {"base_lrs": new, "_last_lr": rates})
        place = f"step {to}" if to else "the start"
        return f"back to {place}, lr {old[0]:.2g} -> {new[0]:.2g}"

    def _go_back(self, step: int) -> int:
        """Go back to the state after the best step before `step`, or 0, and return which it is."""
        state, zero_order = self._trainer.state, self._trainer.zero_order
        best = self._folder / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and state.best_global_step < step and best.is_dir():
            self._load(best)
            return state.best_global_step
        bases = dict(zero_order.bases) if zero_order else {}
        self._load(self._folder / INITIAL)
        if zero_order and zero_order.keeps_coefficients and not zero_order.bases:
            if zero_order.trains_bases:  # they have moved too: zeros, until the next batch gives new ones
                bases = {name: torch.zeros_like(basis) for name, basis in bases.items()}
            zero_order.set_bases(bases)  # with coefficients of zero, which can be saved
            if zero_order.trains_bases:
                zero_order.renewed_at = None
        state.best_global_step = state.best_metric = state.best_model_checkpoint = None  # of after the trouble began
        return 0

    def _load(self, folder: Path) -> None:
        trainer = self._trainer
        assert trainer.optimizer is not None
        trainer.state.best_model_checkpoint = str(folder)
        trainer._load_best_model()
        trainer.optimizer.load_state_dict(torch.load(folder / OPTIMIZER_STATE, map_location="cpu", weights_only=True))
