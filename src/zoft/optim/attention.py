"""Attention with its pattern held fixed: a linear map from the values to the outputs, and the way back through it.

Head by head, ``y_i = sum_j a_ij v_j``. The weights a are those of the pass that was seen; how they themselves answer to
queries and keys is neglected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoft.optim.capture import Tokens

LARGE = 1 << 22  # attention weights held at a time


class Attended(NamedTuple):
    """A call of ``scaled_dot_product_attention``: `query` and `output` [B, H, T, d], `key` and `value` [B, G, S, d]."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    output: Tensor


@contextmanager
def attended(see: Callable[[Attended], None]) -> Iterator[None]:
    """While open, `see` is told of every call of torch's ``scaled_dot_product_attention`` in this thread.

    The function is looked up in ``torch.nn.functional`` as it is called, so it is wrapped there; a mode of torch's own
    for this would slow down every other operation of the pass.
    """
    attention, thread = F.scaled_dot_product_attention, threading.get_ident()

    def seen(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **options: Any,
    ) -> Tensor:
        output = attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        if threading.get_ident() == thread and query.dim() == 4:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            see(Attended(query, key, value, attn_mask, is_causal, scale, output))
        return output

    F.scaled_dot_product_attention = seen  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


@dataclass(frozen=True)
class Pattern:
    """The attention weights of a call at the R positions from the first that the loss reads to the last.

    Not the weights are kept but what they are computed from: `query` and `key` of these positions, [B, H, R, d], their
    `mask`, and the logarithm of the sum that they are divided by, `total` float32 [B, H, R]. `read` int64 [rows, 2]
    are the examples and places of what the loss reads.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float
    total: Tensor
    read: Tensor

    @classmethod
    def of(cls, call: Attended, tokens: Tokens, x: Tensor) -> tuple[Pattern, Tensor] | None:
        """The pattern of `call`, and ``sum_j a_ij x_j`` for each head at the rows read, float32 [rows, H, r].

        `x` [B, S, r] belongs to the values; if it is shorter than they are, to the last of them. None if the call is
        not of all the tokens.
        """
        read = tokens.window(call.query.shape[0], call.query.shape[2])
        if read is None or len(x) != len(call.query) or x.shape[1] > call.key.shape[2]:
            return None
        places, count = read
        query, length = call.query[:, :, -count:], call.key.shape[2]
        mask = call.mask
        if call.causal:  # aligned at the first position of both
            mask = torch.ones(call.query.shape[2], length, dtype=torch.bool, device=query.device).tril()
        mask = None if mask is None else mask.expand(*query.shape[:2], -1, -1)[:, :, -count:]
        x = F.pad(x.float(), (0, 0, length - x.shape[1], 0)).unsqueeze(1)
        totals, averages = [], []
        for heads in _parts(query, length):
            logits = _logits(query[:, heads], _of_heads(call.key, heads, query), _part(mask, heads), call.scale)
            totals.append(logits.logsumexp(-1))
            averages.append((logits - totals[-1].unsqueeze(-1)).exp_() @ x)
        key = _of_heads(call.key, slice(None), query)[:, :, -count:]
        mask = None if mask is None else mask[..., -count:]
        pattern = cls(query.clone(), key.clone(), mask, call.scale, torch.cat(totals, 1), places)
        return pattern, pattern.rows(torch.cat(averages, 1))

    def rows(self, x: Tensor) -> Tensor:
        """Those of `x` [B, H, R, r] that the loss reads, [rows, H, r]."""
        return x.transpose(1, 2)[self.read[:, 0], self.read[:, 1]]

    def pull(self, error: Tensor) -> Tensor:
        """The error at the values of the rows read, for `error` at the outputs there; both float32 [rows, H, d]."""
        batch, heads, count, width = self.query.shape
        at_output = error.new_zeros(batch, count, heads, width)
        at_output[self.read[:, 0], self.read[:, 1]] = error
        at_output, at_values = at_output.transpose(1, 2), []
        for part in _parts(self.query, count):
            logits = _logits(self.query[:, part], self.key[:, part], _part(self.mask, part), self.scale)
            weights = (logits - self.total[:, part].unsqueeze(-1)).exp_()
            at_values.append(weights.transpose(-1, -2) @ at_output[:, part])
        return self.rows(torch.cat(at_values, 1))


def _parts(query: Tensor, length: int) -> Iterator[slice]:
    """Heads whose weights for `length` keys are held together."""
    batch, heads, count, _ = query.shape
    size = max(1, LARGE // (batch * count * length))
    return (slice(start, start + size) for start in range(0, heads, size))


def _part(mask: Tensor | None, heads: slice) -> Tensor | None:
    return None if mask is None else mask[:, heads]


def _of_heads(key: Tensor, heads: slice, query: Tensor) -> Tensor:
    """The keys that these heads of `query` look at, where several may share one."""
    each = torch.arange(query.shape[1], device=key.device)[heads] // (query.shape[1] // key.shape[1])
    return key.index_select(1, each)


def _logits(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    logits, least = query.float() @ key.float().transpose(-1, -2) * scale, torch.finfo(torch.float32).min
    if mask is None:
        return logits
    # Finite, as padding may see nothing at all.
    return logits.masked_fill(~mask, least) if mask.dtype == torch.bool else (logits + mask).clamp(min=least)
