"""The way of an error back along the residual stream, from the logits to the first block: what every layer learns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoft.optim.block import Block, Writer
from zoft.optim.capture import Rows
from zoft.optim.gradients import Gradients
from zoft.optim.inside import Attention
from zoft.optim.kept import ALL, BlockCall, Kept, keeping
from zoft.optim.layers import LinearMap
from zoft.optim.stream import Head, Stream
from zoft.optim.transpose import FeedForward, Norm, transposed_product

JOINED = 1 << 23  # numbers of an error at the logits that are multiplied by the head's weight at a time
MOST = 0.9  # of the rows: it is not worth much to leave fewer of them out
ROWS = 128  # that go back through a feed-forward part, or a rotation, at a time: what lies between stays in a cache


@dataclass
class WayBack:
    """From the logits to the first block, over the rows kept; with `attention`, each block runs again first."""

    model: nn.Module
    gradients: Gradients
    kept: Kept
    calls: dict[nn.Module, BlockCall]
    feed_forward: bool
    attention: bool
    energy: float

    def to_end(self, stream: Stream, head: Head | None, given: Tensor | Iterable[Tensor]) -> Tensor:
        """The error at the end of the stream, float32 [rows, d], for that `given` at the output of `head`.

        Or of the last norm, without a head. What is given may come in parts of positions.
        """
        parts = [given] if isinstance(given, Tensor) else given
        if head is not None:
            products = (self.transposed(head.map, part.to(head.map.device)) for part in _joined(parts, head.map))
            parts = [product * head.scale for product in products]
        at_norm = torch.cat(list(parts), dim=-2)
        rows = self.kept.tokens.read(self.kept.tokens.spread(at_norm))
        if rows is None:
            raise ValueError(
                f"the error at the logits is that of {tuple(at_norm.shape[:-1])} tokens, which is not the logits'"
            )
        device = stream.norm.gain.device
        return stream.norm.pull(self.kept.inputs[stream.norm.module].to(device), rows.to(device))

    def through(self, stream: Stream, error: Tensor) -> None:
        """Add what every map learns, from the `error` at the end of the stream back to its beginning."""
        for block in reversed(stream.blocks):
            error = through = error.to(block.device)
            if self.attention:
                self.run_again(block, self.heaviest(error) if block.row_by_row else ALL)
            for step in reversed(block.steps):
                if isinstance(step, Norm):
                    through = step.pull(self.kept.inputs[step.module], through)
                    continue
                at_stream = self.kept.of_some(error if block.parallel else through)
                at_output = self.kept.take(step, at_stream, self.gradients)
                if step.attention is not None and self.attention:
                    through = through + self.attended(step, step.attention, at_output)
                if step.feed_forward is not None and self.feed_forward:
                    through = self.kept.added(through, self.fed_forward(step.feed_forward, at_output))
            error = through

    def heaviest(self, error: Tensor) -> Rows:
        """The fewest rows that have `energy` of the squared `error`; all, if they are most."""
        squared, order = error.square().sum(1).sort(descending=True)
        enough = int((squared.cumsum(0) < self.energy * squared.sum()).sum()) + 1
        return order[:enough].sort().values if enough < MOST * len(order) else ALL

    def run_again(self, block: Block, some: Rows) -> None:
        """Keep of `block` what the way back takes: of all blocks at once it would be much where the loss reads much."""
        self.kept = Kept(self.kept.tokens, some)
        with keeping(self.model, self.gradients, self.kept, [block], feed_forward=self.feed_forward, attention=True):
            self.calls.pop(block.module).again(block, self.kept.tokens.some(some))

    def fed_forward(self, part: FeedForward, error: Tensor) -> Tensor:
        """The error at what `part` reads of the stream, for that at its output; adds what its inner maps learn."""
        weights = [layer.weight for layer in (*part.inner, part.down)]
        at_hand = all(weight is not None and not weight.is_meta for weight in weights)  # else each part loads them
        parts = _slices(len(error), ROWS if at_hand else len(error))
        h = self.kept.of_some(self.kept.inputs[part.reader])
        found = torch.cat([self._fed_forward(part, h[rows], error[rows], rows) for rows in parts])
        for layer in part.inner:  # room for what the way through attention takes
            self.kept.outputs.pop(layer.name, None)
            self.kept.learned_from.pop(layer.name, None)
        return found

    def _fed_forward(self, part: FeedForward, h: Tensor, error: Tensor, rows: slice) -> Tensor:
        """The same for some `rows`, with the stream `h` there."""
        names = [layer.name for layer in part.inner]
        if part.gate.name in self.kept.outputs:
            outputs = {name: self.kept.outputs[name][rows] for name in names}
            known = self.kept.learned_from
            # What both were given stays one tensor, so that its product with a basis of both is made once.
            shared = {id(known[name]): known[name][rows] for name in names if name in known}
            inputs = {name: shared[id(known[name])] if name in known else None for name in names}
        else:
            x = h if part.norm is None else part.norm.module(h)
            outputs = {layer.name: layer.modules[0](x) for layer in part.inner}
            inputs = {name: self.gradients.keep(name, x) for name in names}
        at_x = part.pull(outputs, error, lambda layer, at_map: self.pulled(layer, inputs.get(layer.name), at_map))
        return _behind(part.norm, h, at_x)

    def attended(self, writer: Writer, attention: Attention, error: Tensor) -> Tensor:
        """The error at what `attention` reads of the stream, for that at the output of its `writer`."""
        pattern, h = self.kept.patterns.pop(attention.values.map.name, None), self.kept.inputs[attention.reader]
        at_x = torch.zeros_like(h, dtype=torch.float32)
        if pattern is None:
            return at_x
        at_heads = self.kept.everywhere(self.transposed(writer.map, error)).unflatten(1, (pattern.query.shape[1], -1))
        errors: dict[str, Tensor] = {}
        made = (attention.queries, pattern.query), (attention.keys, pattern.key), (attention.values, pattern.value)
        for (part, heads), at_part in zip(made, pattern.pull(at_heads), strict=True):
            if part is not None:
                name, outputs, heads = part.map.name, self.kept.outputs[part.map.name], pattern.rows(heads)
                pieces = _slices(len(outputs), ROWS)
                at_map = torch.cat([part.pull(at_part[rows], outputs[rows], heads[rows]) for rows in pieces])
                errors[name] = errors[name] + at_map if name in errors else at_map
        for name, at_map in errors.items():
            at_x = at_x + self.pulled(attention.maps[name], self.kept.learned_from.pop(name, None), at_map)
        return _behind(attention.norm, h, at_x)

    def pulled(self, layer: LinearMap, inputs: Tensor | None, error: Tensor) -> Tensor:
        """The error at what `layer` is given, for that at its output; adds what it learns, if `inputs` were kept."""
        if inputs is not None:
            self.gradients.add(layer.name, inputs, error)
        return self.transposed(layer, error)

    def transposed(self, layer: LinearMap, error: Tensor) -> Tensor:
        """``error W`` with the weight as it is in this pass, coefficients included."""
        product = transposed_product(layer, error)
        at_coordinates, basis = self.gradients.by_factor(layer.name, error), self.gradients.branches.basis(layer.name)
        return product if at_coordinates is None or basis is None else product + at_coordinates @ basis.t()


def _joined(parts: Iterable[Tensor], layer: LinearMap) -> Iterator[Tensor]:
    """Some `parts` side by side, in the precision that they are multiplied in: reading a weight takes long too."""
    halved = layer.weight is not None and layer.weight.dtype == torch.bfloat16
    some: list[Tensor] = []
    for part in parts:
        some.append(part.to(torch.bfloat16 if halved else torch.float32))
        if sum(part.numel() for part in some) > JOINED:
            yield torch.cat(some, -2)
            some.clear()
    if some:
        yield torch.cat(some, -2)


def _slices(count: int, size: int) -> list[slice]:
    """Of `count` rows, so many at a time."""
    return [slice(start, start + size) for start in range(0, count, size)]


def _behind(norm: Norm | None, h: Tensor, at_x: Tensor) -> Tensor:
    """The error at `h`, for that at what `norm` makes of it, or at `h` itself without one."""
    return at_x if norm is None else norm.pull(h, at_x)
