"""The left factor computed instead of drawn: the error at the output, carried back along the residual stream.

At the positions whose logits the loss reads, the gradient at the logits is known (for cross-entropy, p - y). Head and
final norm carry it to the end of the residual stream, transposed and in closed form; the stream itself carries it back
almost unchanged, because every block adds to it: ``h_end = h_l + (what later blocks add)``. So for a matrix that writes
its input x into the stream, ``G ~ sum over positions of e x^T``, and its coefficients in a basis A of the inputs are
``C = sum of e (x A)^T``. Blocks that normalise the stream itself (BERT's kind) carry it through their norms. Where a block's feed-forward part is known in closed form, the error is carried through it as
well, which gives its inner matrices their factors and corrects the error for the blocks before.

With its pattern held fixed, attention is a linear map of the values (`zoft.optim.attention`): if it is asked for, the
error is carried through it to all tokens, and the matrices that make the values have factors too. What that takes is
much, so that the first pass keeps only what each block was called with, and each runs again before the error goes back
through it.

What is neglected is the rest of the way through attention: how its pattern changes, or all of it, and with it the error
at positions that the loss does not read. The estimate is therefore biased, but needs no probe: one forward pass. It is
white-box (weights of the head and within the blocks are read, transposed) and asks the loss for its slope at the
logits. Of a loss that does not know it, or behind another head, autograd takes the slope at what the final norm gives:
of the blocks nothing is recorded, and the linear maps that follow learn from the gradient itself.

Relatives: feedback alignment (Lillicrap et al. 2016) and direct feedback alignment (Nøkland 2016) send errors back
through fixed matrices; the logit lens (nostalgebraist 2020) reads the stream through the head in the other direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim.block import Block, Writer
from zoft.optim.capture import Tokens
from zoft.optim.estimator import Estimate
from zoft.optim.inside import Attention
from zoft.optim.kept import BlockCall, Kept, called, coordinates, keeping
from zoft.optim.landscape import Divisible, Landscape
from zoft.optim.layers import LinearMap
from zoft.optim.loss import Differentiated
from zoft.optim.stream import Head, NoStream, Stream, find_stream
from zoft.optim.transpose import FeedForward, Norm, transposed_product

JOINED = 1 << 23  # numbers of an error at the logits that are multiplied by the head's weight at a time
SHARE = 64  # one such part of the weights' memory may what all blocks are called with take
WIDE = 8  # widths of the stream at a token: so much, about, holds the pass of a block at once
LEAST = 512  # tokens in a part of a batch: with fewer, each takes longer
ROWS = 128  # that go back through a feed-forward part at a time: what lies between its maps stays in a cache


@dataclass
class Guided:
    """Left factors from the output error, by one clean forward pass.

    `feed_forward` carries the error through the feed-forward parts, exactly, and gives their inner matrices factors
    too; `attention` does so for attention, its pattern held fixed, and the matrices that make its values (where torch's
    ``scaled_dot_product_attention`` computes it), for which every block runs a second time, so that it counts as two
    forwards; with `attention_after`, in the first step, which shows whether blocks can, and then only after so many
    steps. What all blocks were called with is held meanwhile: if that is more than a 64th of the weights' memory, a
    `Divisible` closure's batch goes through in parts, if it is long enough that each holds about as much as the pass of
    one block does of the whole batch (due bases, those of the whole batch, then take one pass more).

    Without both only the matrices that write into the stream have factors, and the stream counts as the identity. Then
    the error is the same for all of them, and with `two_pass` it is known before a second pass, in which each factor is
    taken as its layer is called: nothing is kept per layer.

    Where the closure returns a `Loss` with its slope, and the logits come straight from a linear head that is not
    trained, all is in closed form. Else autograd takes the slope of the loss, back to the end of the stream and no
    further, and what follows it (a classifier) is trained by what it finds there.

    Raises:
        ValueError: `two_pass` with `feed_forward` or `attention`, or `attention_after` without `attention`.
        NoStream: when called, if the model has no stream, or what is to be trained is nothing that it reaches.
        NotRepeatable: when called with `attention`, if a block, run again, gives something else (dropout).
    """

    feed_forward: bool = True
    attention: bool = False
    two_pass: bool = False
    attention_after: int = 0
    _stream: Stream | None = field(default=None, repr=False)
    _head: Head | None = field(default=None, repr=False)  # at whose logits the closure gives its slope

    def __post_init__(self) -> None:
        if self.two_pass and (self.feed_forward or self.attention):
            raise ValueError(
                "two_pass keeps nothing to go through the blocks with: set feed_forward=False, and leave attention out"
            )
        if self.attention_after < 0 or (self.attention_after and not self.attention):
            raise ValueError("attention_after is a number of steps, and takes attention=True")

    def __call__(self, landscape: Landscape, estimate: Estimate) -> tuple[float, list[float]]:
        ranks, step = landscape.ranks, int(landscape.key[1])
        through_attention = self.attention and (step == 0 or step >= self.attention_after)
        if self._stream is None:
            found = find_stream(landscape.model, landscape.look)
            if ranks.any(found is None):
                return math.nan, [math.nan]
            assert found is not None
            fixed = found.head is not None and found.head.map.name not in landscape.branches.named
            self._stream, self._head = found, found.head if landscape.sloped and fixed else None
        stream, closure = self._stream, landscape.closure
        if self.two_pass and any(block.norms for block in stream.blocks):
            raise NoStream("the error is not the same everywhere, for blocks normalise the stream: leave two_pass out")
        landscape.reached = stream.reached(self.feed_forward, self.attention)
        if not landscape.reached & landscape.branches.named.keys():
            raise NoStream(
                "none of the layers to be trained, such as "
                f"{next(iter(landscape.branches.named))!r}, is among those that the estimate reaches"
            )
        if through_attention and ranks.count == 1 and isinstance(closure, Divisible):
            return self._in_parts(landscape, closure, estimate, stream)
        return self._carried(landscape, estimate, stream, through_attention)

    def _in_parts(
        self, landscape: Landscape, whole: Divisible, estimate: Estimate, stream: Stream
    ) -> tuple[float, list[float]]:
        """The estimate through attention, from as many parts of the batch as memory asks for."""
        blocks, weights = len(stream.blocks), sum(parameter.nbytes for parameter in landscape.model.parameters())
        little = SHARE * whole.tokens * blocks * stream.token_bytes <= weights
        number = 1 if little else min(math.ceil(blocks / WIDE), whole.tokens // LEAST)
        parts = whole.divide(max(1, number))
        if len(parts) > 1 and landscape.needs_clean and not math.isfinite(loss := landscape.clean()):  # bases of it all
            return loss, [loss]
        before, losses = landscape.forwards, []
        for part in parts:
            landscape.closure = part
            loss, gradients = self._carried(landscape, estimate, stream, through_attention=True)
            if gradients:  # not finite
                return loss, gradients
            losses.append(loss)
        landscape.forwards = before + (landscape.forwards - before) // len(parts)
        for factor in estimate.factors.values():
            factor /= len(parts)
        return mean(losses), []

    def _carried(
        self, landscape: Landscape, estimate: Estimate, stream: Stream, through_attention: bool
    ) -> tuple[float, list[float]]:
        """The estimate from one forward pass, through attention two."""
        ranks, kept = landscape.ranks, Kept(Tokens(everywhere=through_attention))
        if self._head is None:
            behind = {name: layer.module for name, layer in landscape.branches.named.items() if name in stream.behind}
            take = partial(_take, landscape, estimate)
            landscape.closure = Differentiated(landscape.closure, stream.norm.module, behind, take)
        blocks = [] if self.two_pass or through_attention else stream.blocks
        with (
            keeping(landscape, kept, blocks, {stream.norm.module}, feed_forward=self.feed_forward),
            called(stream.blocks if through_attention else ()) as calls,
        ):
            loss = landscape.clean()
        if not math.isfinite(loss):
            return loss, [loss]
        if landscape.error is None:
            raise TypeError("the guided estimate needs the loss's slope, which the closure gave before")
        way = _WayBack(landscape, estimate, kept, calls, self.feed_forward, through_attention)
        error = way.to_end(stream, self._head, landscape.error())
        landscape.error = None  # the logits are no longer needed
        if self.two_pass:
            with _taken(landscape, estimate, stream, error):
                landscape.forward()
        else:
            way.through(stream, error)
            landscape.forwards += int(through_attention)  # every block ran once more
        estimate.factors = ranks.average(estimate.factors, landscape.losses.numel())
        return loss, []

    def __str__(self) -> str:
        return "guided"


@contextmanager
def _taken(landscape: Landscape, estimate: Estimate, stream: Stream, error: Tensor) -> Iterator[None]:
    """While open, a forward pass adds each writer's factor once it is called, for the same `error` at all of them."""
    kept = Kept()

    def take(writer: Writer) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept.take(writer, error, estimate)

        return see

    with ExitStack() as handles:
        handles.enter_context(keeping(landscape, kept, stream.blocks))
        for writer in stream.writers:
            (last,) = [writer.norm.module] if writer.norm else writer.map.modules
            handles.callback(last.register_forward_hook(take(writer)).remove)
        yield


def _take(landscape: Landscape, estimate: Estimate, name: str, x: Tensor, error: Tensor) -> None:
    """Add the factor of the map called `name`, by its input and the `error` at its output."""
    basis = landscape.branches.basis(name)
    if basis is not None:
        estimate.add_factor(name, error.t() @ coordinates(x, basis))


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


def _behind(norm: Norm | None, h: Tensor, at_x: Tensor) -> Tensor:
    """The error at `h`, for that at what `norm` makes of it, or at `h` itself without one."""
    return at_x if norm is None else norm.pull(h, at_x)


@dataclass
class _WayBack:
    """From the logits to the first block, over the rows kept; with `attention`, each block runs again first."""

    landscape: Landscape
    estimate: Estimate
    kept: Kept
    calls: dict[nn.Module, BlockCall]
    feed_forward: bool
    attention: bool

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
        """Add every factor, from the `error` at the end of the stream back to its beginning."""
        for block in reversed(stream.blocks):
            if self.attention:
                self.run_again(block)
            error = through = error.to(block.device)
            for step in reversed(block.steps):
                if isinstance(step, Norm):
                    through = step.pull(self.kept.inputs[step.module], through)
                    continue
                at_output = self.kept.take(step, error if block.parallel else through, self.estimate)
                if step.attention is not None and self.attention:
                    through = through + self.attended(step, step.attention, at_output)
                if step.feed_forward is not None and self.feed_forward:
                    through = through + self.fed_forward(step.feed_forward, at_output)
            error = through

    def run_again(self, block: Block) -> None:
        """Keep of `block` what the way back takes: of all blocks at once it would be much where the loss reads much."""
        self.kept = Kept(self.kept.tokens)
        with keeping(self.landscape, self.kept, [block], feed_forward=self.feed_forward, attention=True):
            self.calls.pop(block.module).again(block, self.kept.tokens)

    def fed_forward(self, part: FeedForward, error: Tensor) -> Tensor:
        """The error at what `part` reads of the stream, for that at its output; adds the factors of its inner maps."""
        weights = [layer.weight for layer in (*part.inner, part.down)]
        at_hand = all(weight is not None and not weight.is_meta for weight in weights)  # else each part loads them
        together = ROWS if at_hand else len(error)
        parts = [slice(start, start + together) for start in range(0, len(error), together)]
        return torch.cat([self._fed_forward(part, error[rows], rows) for rows in parts])

    def _fed_forward(self, part: FeedForward, error: Tensor, rows: slice) -> Tensor:
        """The same for some `rows`."""
        h = self.kept.inputs[part.reader][rows]
        bases = {layer.name: self.landscape.branches.basis(layer.name) for layer in part.inner}
        if part.gate.name in self.kept.outputs:
            outputs = {name: self.kept.outputs[name][rows] for name in bases}
            inputs = {name: self.kept.coordinates[name][rows] for name, basis in bases.items() if basis is not None}
        else:
            x = h if part.norm is None else part.norm.module(h)
            outputs = {layer.name: layer.modules[0](x) for layer in part.inner}
            inputs = {name: coordinates(x, basis) for name, basis in bases.items() if basis is not None}
        at_x, errors = part.pull(outputs, error, self.transposed)
        for name, xs in inputs.items():
            self.estimate.add_factor(name, errors[name].t() @ xs)
        return _behind(part.norm, h, at_x)

    def attended(self, writer: Writer, attention: Attention, error: Tensor) -> Tensor:
        """The error at what `attention` reads of the stream, for that at the output of its `writer`; adds a factor."""
        name, columns = attention.values.name, attention.columns
        if name not in self.kept.patterns:
            return torch.zeros_like(error)
        pattern, projected = self.kept.patterns.pop(name)
        at_heads = self.transposed(writer.map, error).unflatten(1, (pattern.query.shape[1], -1))
        at_averages, averages = pattern.pull(at_heads, projected)
        if projected.shape[2]:
            factor = averages.new_zeros(attention.values.d_out, projected.shape[2])
            of_heads = torch.einsum("nhd,nhr->hdr", at_heads, averages).flatten(0, 1)
            self.estimate.add_factor(name, factor.index_add_(0, columns, of_heads))
        at_values = error.new_zeros(len(error), attention.values.d_out)
        at_values.index_add_(1, columns, at_averages.flatten(1))
        at_x = self.transposed(attention.values, at_values)
        return _behind(attention.norm, self.kept.inputs[attention.reader], at_x)

    def transposed(self, layer: LinearMap, error: Tensor) -> Tensor:
        """``error W`` with the weight as it is in this pass, coefficients included."""
        product = transposed_product(layer, error)
        coefficients, basis = self.landscape.branches.factors.get(layer.name), self.landscape.branches.basis(layer.name)
        return product if coefficients is None or basis is None else product + error @ coefficients @ basis.t()
