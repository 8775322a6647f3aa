"""Some rows of a batch by themselves through the parts of a block that treat each row alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim.block import Writer
from zoft.optim.capture import OfLastInput, Tokens
from zoft.optim.layers import input_of


@contextmanager
def alone(tokens: Tokens, writers: Sequence[Writer]) -> Iterator[None]:
    """While open, only the rows that `tokens` reads go through `writers` and the feed-forward parts that they end.

    Maps are given them as [rows, d_in]. What a writer gives is as long as ever, with zeros at the other rows.
    """
    with ExitStack() as handles:
        for writer in writers:
            part = _Part(tokens)
            first = (writer.map,) if writer.feed_forward is None else writer.feed_forward.inner
            for layer in first:
                (module,) = layer.modules
                handles.callback(module.register_forward_pre_hook(part.shorten, with_kwargs=True).remove)
            (module,) = writer.map.modules
            handles.callback(module.register_forward_hook(part.lengthen).remove)
        yield


class _Part:
    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.shape = torch.Size()  # of all rows
        self.places: Tensor | None = None  # of those that go on
        self.last = OfLastInput[Tensor]()  # gate and up are given one tensor

    def shorten(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = input_of(args, kwargs)
        self.shape, self.places = x.shape[:-1], (places := self.tokens.places(x.shape))
        if places is None:
            return None
        rows = self.last.get(x, lambda: x.flatten(0, -2).index_select(0, places.to(x.device)))
        return ((rows, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): rows})

    def lengthen(self, module: nn.Module, args: tuple[Any, ...], rows: Tensor) -> Tensor | None:
        if self.places is None:
            return None
        whole = rows.new_zeros(self.shape.numel(), rows.shape[1])
        return whole.index_copy_(0, self.places.to(rows.device), rows).view(*self.shape, -1)
