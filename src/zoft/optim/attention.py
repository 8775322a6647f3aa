"""Attention and the way back through it: from the outputs to queries, keys and values.

Head by head, ``y_i = sum_j a_ij v_j`` with the weights ``a_i = softmax_j(scale q_i . k_j)``.
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
from zoft.optim.placement import unrounded

LARGE = 1 << 20  # attention weights held at a time


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
            with unrounded(query.device):
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

    Not the weights are held but what they are computed from: `query` [B, H, R, d] of these positions, `key` and `value`
    [B, G, S, d] of all, and their `mask`. `read` int64 [rows, 2] are the examples and places, among the R, of what the
    loss reads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    read: Tensor

    @classmethod
    def of(cls, call: Attended, tokens: Tokens) -> Pattern | None:
        """The pattern of `call`; None if it is not of all the tokens."""
        batch, heads, positions, _ = call.query.shape
        places = tokens.window(batch, positions)
        if places is None or (call.causal and positions != call.key.shape[2]):
            return None
        read, count = places
        mask = None if call.mask is None else call.mask.expand(batch, heads, -1, -1)[:, :, -count:]
        query = call.query[:, :, -count:]
        return cls(query, call.key, call.value, mask, call.causal, call.scale, read.to(query.device))

    def output(self) -> Tensor:
        """The averages of the values, head by head, at the rows read, float32 [rows, H, d]."""
        averages = (self._weights(heads) @ self._of(self.value, heads) for heads in self._parts())
        return self.rows(torch.cat(list(averages), 1))

    def pull(self, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The errors at queries, keys and values of the rows read, for that at the outputs, float32 [rows, H, d].

        Heads that look at the same keys and values each have a share of the error there.
        """
        batch, _, count, _ = self.query.shape
        at_output = error.new_zeros(batch, count, *error.shape[1:])
        at_output[self.read[:, 0], self.read[:, 1]] = error
        at_output = at_output.transpose(1, 2)
        at_queries, at_keys, at_values = [], [], []
        for heads in self._parts():
            weights, at_heads = self._weights(heads), at_output[:, heads]
            at_weights = at_heads @ self._of(self.value, heads).transpose(-1, -2)
            at_weights -= (at_weights * weights).sum(-1, keepdim=True)
            at_logits = at_weights.mul_(weights).mul_(self.scale)
            at_queries.append(at_logits @ self._of(self.key, heads))
            at_keys.append(at_logits.transpose(-1, -2) @ self.query[:, heads].float())
            at_values.append(weights.transpose(-1, -2) @ at_heads)
        at_query, at_key, at_value = (self.rows(torch.cat(parts, 1)) for parts in (at_queries, at_keys, at_values))
        return at_query, at_key, at_value

    def rows(self, x: Tensor) -> Tensor:
        """Those of `x` [B, H or G, S, d] at the rows read, [rows, H, d]; of the S positions, the R are the last."""
        places = self.read[:, 1] + x.shape[2] - self.query.shape[2]
        return x.transpose(1, 2)[self.read[:, 0], places]

    def _parts(self) -> Iterator[slice]:
        """Heads whose weights are held together."""
        batch, heads, count, _ = self.query.shape
        size = max(1, LARGE // (batch * count * self.key.shape[2]))
        return (slice(start, start + size) for start in range(0, heads, size))

    def _of(self, x: Tensor, heads: slice) -> Tensor:
        """What these heads look at, of keys or values `x` [B, G, S, d], float32 [B, heads, S, d]."""
        sharing = self.query.shape[1] // x.shape[1]
        return x.index_select(1, torch.arange(self.query.shape[1], device=x.device)[heads] // sharing).float()

    def _weights(self, heads: slice) -> Tensor:
        """Those of these heads, float32 [B, heads, R, S], finite: padding may see nothing at all."""
        query, least = self.query[:, heads].float(), torch.finfo(torch.float32).min
        logits = query @ self._of(self.key, heads).transpose(-1, -2) * self.scale
        if self.causal:  # the last query sees the last key
            seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device)
            logits = logits.masked_fill_(~seen.tril(logits.shape[-1] - logits.shape[-2]), least)
        if self.mask is None:
            return logits.softmax(-1)
        mask = self.mask[:, heads]
        logits = logits.masked_fill_(~mask, least) if mask.dtype == torch.bool else (logits + mask).clamp_(min=least)
        return logits.softmax(-1)
