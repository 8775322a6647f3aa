"""A loss that knows its slope at the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    """What a closure may return instead of a tensor, for methods that ask for more.

    `values` is the mean loss, or one loss per example [batch]; ``error()`` the gradient of their mean with respect to
    the logits that the model returned, in their shape. Where an example is several sequences of the model's batch,
    `examples` int64 [sequences] says which example each belongs to.
    """

    values: Tensor
    error: Callable[[], Tensor] | None = None
    examples: Tensor | None = None


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Loss:
    """The mean negative log-likelihood of the tokens `labels` [batch, tokens] of a causal model, with its error.

    `logits` [batch, K, vocabulary] are those at the final K positions, which predict the token after them.
    """
    following = F.pad(labels, (0, 1), value=ignore_index)[:, -logits.shape[1] :]
    flat = logits.flatten(0, 1).float()
    value = F.cross_entropy(flat, following.flatten(), ignore_index=ignore_index)

    def error() -> Tensor:
        counted = following != ignore_index
        wrong = logits.detach().softmax(-1, dtype=torch.float32)
        wrong.scatter_add_(-1, following.clamp(min=0).unsqueeze(-1), -wrong.new_ones(*following.shape, 1))
        return wrong.mul_((counted / counted.sum().clamp(min=1)).unsqueeze(-1))

    return Loss(value, error)
