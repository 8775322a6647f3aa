"""Losses of fixed batches of a task, as closures: what measurements evaluate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from zoft.data import Collator, Encoder, Row, Task, TaskDataset, losses, read_logits, slope
from zoft.optim import Loss
from zoft.train.models import room


def task_batches(model: Any, tokenizer: Any, task: Task, rows: list[Row], size: int) -> list[dict[str, Tensor]]:
    """`rows` as training batches of `size` examples on the model's device; a remainder is left out."""
    items = TaskDataset(rows, Encoder(tokenizer, task, room(model, task)))
    collate = Collator(tokenizer.pad_token_id, "train")
    batches = [collate([items[i + k] for k in range(size)]) for i in range(0, len(rows) - size + 1, size)]
    return [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]


def task_closures(model: Any, batches: list[dict[str, Tensor]]) -> list[Callable[[], Loss]]:
    """The mean loss of each batch by `model`, and its slope."""

    def loss(batch: dict[str, Tensor]) -> Loss:
        logits = read_logits(model, batch)
        return Loss(losses(logits, batch).mean(), partial(slope, logits, batch))

    return [partial(loss, batch) for batch in batches]
