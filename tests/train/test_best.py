"""Which evaluation counts as the best."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from zoft.train import TaskTrainer


def best_step(evaluations: list[tuple[float, float | None]]) -> int | None:
    """The step kept of `evaluations`, (accuracy, loss), one each step."""
    trainer: Any = object.__new__(TaskTrainer)
    trainer.args = SimpleNamespace(
        metric_for_best_model="eval_accuracy", greater_is_better=True, save_strategy=SaveStrategy.BEST
    )
    trainer.save_steps, trainer.state, trainer.control = None, TrainerState(), TrainerControl()
    saved = []
    for step, (accuracy, loss) in enumerate(evaluations, start=1):
        metrics = {"eval_accuracy": accuracy} | ({} if loss is None else {"eval_loss": loss})
        trainer.state.global_step = step
        trainer.state.log_history.append({"step": step, "loss": 0.1})
        trainer.state.log_history.append({"step": step, **metrics})
        if trainer._determine_best_metric(metrics, None):
            saved.append(step)
    assert saved[-1] == trainer.state.best_global_step
    return saved[-1]


@pytest.mark.parametrize(
    ("evaluations", "kept"),
    [
        ([(0.5, 0.9), (0.7, 0.8), (0.6, 0.2)], 2),
        ([(0.7, 0.8), (0.7, 0.6), (0.7, 0.7)], 2),  # a tie on accuracy
        ([(0.7, 0.6), (0.7, 0.8)], 1),
        ([(0.7, None), (0.7, None)], 1),  # generation has no loss
    ],
)
def test_equal_metrics_are_told_apart_by_the_loss(evaluations: list[tuple[float, float | None]], kept: int) -> None:
    assert best_step(evaluations) == kept
