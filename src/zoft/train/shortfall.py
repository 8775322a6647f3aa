"""A metric as an objective: what answers fall short of the best by, as probes take it, or what is expected of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoft.data import Row, Task, drawn, score_each
from zoft.train.generate import as_texts, generate, lengths, random_as


@dataclass(frozen=True)
class Shortfall:
    """One minus the `metric` of what is predicted for `rows`, of which `samples` answers are drawn if need be."""

    task: Task
    metric: str
    rows: Sequence[Row]
    tokenizer: Any
    samples: int

    def of(self, guesses: Sequence[Any], index: Sequence[int]) -> Tensor:
        """That of each of the `guesses`, candidates' indices or texts, for the rows of these numbers; float64."""
        found = score_each(self.task, self.metric, guesses, [self.rows[i] for i in index])
        return 1 - torch.tensor(found, dtype=torch.float64)

    def expecting(self, model: Any, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """`batch` with what `zoft.data.losses` and `zoft.data.slope` take to be of the shortfall's expected value.

        Over all candidates, or over answers that `model` draws, the same ones for the same `seed`, step and rows.
        """
        index = batch["index"].tolist()
        if self.task.kind != "generation":
            return batch | {"shortfalls": self._of_candidates(batch, index)}
        with torch.no_grad(), random_as(hash((seed, *index)) % 2**63, batch["input_ids"].device):
            answers = generate(model, self.tokenizer, self.task, batch, samples=self.samples)
        texts, repeated = as_texts(self.tokenizer, answers), [i for i in index for _ in range(self.samples)]
        ends = lengths(model, self.tokenizer, self.task, answers)
        return drawn(batch, answers, ends, self.of(texts, repeated))

    def _of_candidates(self, batch: dict[str, Tensor], index: list[int]) -> Tensor:
        """Float32 [B, C]; an example with fewer candidates has its last again."""
        targets = batch["targets"]
        counts = batch["counts"].tolist() if "counts" in batch else [len(batch["label_words"])] * len(targets)
        places = range(max(counts))
        each = [self.of([min(place, count - 1) for count in counts], index) for place in places]
        return torch.stack(each, 1).to(targets.device, torch.float32)
