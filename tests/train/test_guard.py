"""Going back, seen from the optimizer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainingArguments

import zoft
from optim.models import changed, llama, snapshot, token_batch
from zoft import ZOTrainer
from zoft.train.guard import Guard

from .test_zo_trainer import examples


def back(model: PreTrainedModel, optimizer: Any, args: TrainingArguments) -> str:
    """Train for three steps, go back, and return what the guard says."""
    trainer = ZOTrainer(model, args, train_dataset=examples(), optimizers=(optimizer, None))
    guard = Guard(trainer)
    guard.keep_initial()
    trainer.train()
    return guard.back_off(3)


@pytest.mark.parametrize("method", [zoft.AGZO, zoft.MeZO, zoft.ZOAct])
def test_back_to_the_start(method: Any, arguments: Callable[..., TrainingArguments]) -> None:
    model = llama()
    initial, optimizer = snapshot(model), method(model, lr=0.03)
    assert back(model, optimizer, arguments(max_steps=3, lr_scheduler_type="constant")).endswith("lr 0.03 -> 0.01")
    assert changed(model, initial) == set()
    assert all(not factor.any() for factor in optimizer.coefficients.values())
    assert not any(optimizer.updates.values())
    assert optimizer.counters.steps == 3  # so that no noise comes again
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_first_order_goes_back(arguments: Callable[..., TrainingArguments]) -> None:
    model = llama()
    initial, optimizer = snapshot(model), torch.optim.AdamW(model.parameters(), lr=0.03)
    back(model, optimizer, arguments(max_steps=3))
    assert changed(model, initial) == set() and not optimizer.state


def test_bases_that_have_moved_are_taken_anew(arguments: Callable[..., TrainingArguments]) -> None:
    """Those of the moment of trouble may be large, or no numbers."""
    model, batch = llama(), token_batch()
    optimizer = zoft.Guided(model, lr=0.3, attention=True, train_bases=True)
    back(model, optimizer, arguments(max_steps=3, lr_scheduler_type="constant"))
    assert not any(tensor.any() for tensor in (*optimizer.coefficients.values(), *optimizer.bases.values()))
    optimizer.step(lambda: zoft.cross_entropy(model(**batch).logits, batch["labels"]))
    longest = [float(basis.norm(dim=0).max()) for basis in optimizer.bases.values()]
    assert longest == pytest.approx([1.0] * len(longest), rel=1e-3)
    assert all(factor.any() for factor in optimizer.coefficients.values())
