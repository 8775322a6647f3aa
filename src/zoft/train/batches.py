"""Losses of fixed batches of a task, as closures: what measurements evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoft.data import IGNORE, Collator, Encoder, Row, Task, TaskDataset, divide, examples, losses, read_logits, slope
from zoft.errors import UserError
from zoft.optim import Loss
from zoft.optim.placement import device_of
from zoft.train.head import find_head
from zoft.train.models import longest, room

WORDS = 64  # with two, and logits in half precision, a probe may change no loss, and a step would have no update


def task_batches(
    model: Any, tokenizer: Any, task: Task, rows: list[Row], size: int, length: int | None = None
) -> list[dict[str, Tensor]]:
    """`rows` as training batches of `size` examples on the model's device; a remainder is left out.

    An example has at most `length` tokens, if it is given, and as many as the model has room for.
    """
    items = TaskDataset(rows, Encoder(tokenizer, task, room(model, task, length)))
    collate = Collator(tokenizer.pad_token_id, "train")
    batches = [collate([items[i + k] for k in range(size)]) for i in range(0, len(rows) - size + 1, size)]
    return [{name: tensor.to(device_of(model)) for name, tensor in batch.items()} for batch in batches]


def random_batch(model: Any, size: int, length: int, seed: int = 0, texts: bool = False) -> dict[str, Tensor]:
    """`size` sequences of `length` random tokens, each to be followed by one of `WORDS` random label words.

    Or `texts`, whose tokens are all to be predicted but the first. On the model's device, and as `Collator` has such
    batches.

    Raises:
        UserError: the model takes no sequence of this length.
    """
    most = longest(model)
    if most is not None and length > most:
        raise UserError(f"the model takes {most} tokens; {length} are too many")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (size, length), generator=generator)
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(length).expand(size, length),
    }
    if texts:
        batch["labels"] = torch.cat((torch.full_like(tokens[:, :1], IGNORE), tokens[:, 1:]), 1)
    else:
        batch["label_words"] = torch.randperm(vocabulary, generator=generator)[:WORDS]
        batch["targets"] = torch.randint(min(WORDS, vocabulary), (size,), generator=generator)
    return {name: tensor.to(device_of(model)) for name, tensor in batch.items()}


@dataclass(frozen=True)
class BatchLoss:
    """A closure: the `loss` of a task's `batch`, and of parts of it (`zoft.optim.landscape.Divisible`)."""

    loss: Callable[[dict[str, Tensor]], Any]
    batch: dict[str, Tensor]

    def __call__(self) -> Any:
        return self.loss(self.batch)

    @property
    def tokens(self) -> int:
        """Of the batch, padding included."""
        return self.batch["input_ids"].numel()

    def divide(self, number: int) -> list[BatchLoss]:
        """Those of parts of the batch, as `zoft.data.divide` cuts it."""
        return [BatchLoss(self.loss, part) for part in divide(self.batch, number)]


def task_closures(model: Any, batches: list[dict[str, Tensor]]) -> list[BatchLoss]:
    """Of each batch the losses of its examples by `model`, and the slope of their mean."""
    head = find_head(model)

    def loss(batch: dict[str, Tensor]) -> Loss:
        logits = read_logits(model, batch, head)
        return Loss(losses(logits, batch), partial(slope, logits, batch), examples(batch))

    return [BatchLoss(loss, batch) for batch in batches]
