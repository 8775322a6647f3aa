"""A loss that knows its slope at the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 1 << 20  # logits that are held in float32 at a time


class Loss(NamedTuple):
    """What a closure may return instead of a tensor, for methods that ask for more.

    `values` is the mean loss, or one loss per example [batch]; ``error()`` the gradient of their mean with respect to
    the logits that the model returned, in their shape, or in parts of some positions each, one after the other. Where
    an example is several sequences of the model's batch, `examples` int64 [sequences] says which example each belongs
    to.
    """

    values: Tensor
    error: Callable[[], Tensor | Iterable[Tensor]] | None = None
    examples: Tensor | None = None


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Loss:
    """The mean negative log-likelihood of the tokens `labels` [batch, tokens] of a causal model, with its error.

    `logits` [batch, K, vocabulary] are those at the final K positions, which predict the token after them. They are
    held in float32 some positions at a time.
    """
    following = F.pad(labels, (0, 1), value=ignore_index)[:, -logits.shape[1] :]
    together = max(1, LARGE // logits[:, 0].numel())
    parts = list(zip(logits.split(together, 1), following.split(together, 1), strict=True))
    count = (following != ignore_index).sum()

    def error() -> Iterator[Tensor]:
        for part, right in parts:
            wrong = part.detach().softmax(-1, dtype=torch.float32)
            wrong.scatter_add_(-1, right.clamp(min=0).unsqueeze(-1), -wrong.new_ones(*right.shape, 1))
            yield wrong.mul_(((right != ignore_index) / count.clamp(min=1)).unsqueeze(-1))

    losses = [
        F.cross_entropy(part.float().flatten(0, 1), right.flatten(), ignore_index=ignore_index, reduction="sum")
        for part, right in parts
    ]
    return Loss(torch.stack(losses).sum() / count, error)
