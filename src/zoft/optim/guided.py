"""The left factor computed instead of drawn: the error at the output, carried back along the residual stream.

At the positions whose logits the loss reads, the gradient at the logits is known (for cross-entropy, p - y). Head and
final norm carry it to the end of the residual stream, transposed and in closed form; the stream itself carries it back
almost unchanged, because every block adds to it: ``h_end = h_l + (what later blocks add)``. So for a matrix that writes
its input x into the stream, ``G ~ sum over positions of e x^T``, and its coefficients in a basis A of the inputs are
``C = sum of e (x A)^T``. Where a block's feed-forward part is known in closed form, the error is carried through it as
well, which gives its inner matrices their factors and corrects the error for the blocks before.

With its pattern held fixed, attention is a linear map of the values (`zoft.optim.attention`): if it is asked for, the
matrices that make them have factors too, from the inputs of all positions, and the error is carried through it to
other positions that the loss reads.

What is neglected is the rest of the way through attention: the error at positions that the loss does not read, and how
the pattern changes. The estimate is therefore biased, but needs no probe: one forward pass. It is white-box (weights of
the head and within the blocks are read, transposed) and asks the loss for its slope at the logits; no gradient is
recorded.

Relatives: feedback alignment (Lillicrap et al. 2016) and direct feedback alignment (Nøkland 2016) send errors back
through fixed matrices; the logit lens (nostalgebraist 2020) reads the stream through the head in the other direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim.attention import Attended, Pattern, attended
from zoft.optim.capture import Tokens
from zoft.optim.estimator import Estimate
from zoft.optim.landscape import Landscape
from zoft.optim.layers import LinearMap, input_of
from zoft.optim.stream import Attention, Stream, Writer, find_stream
from zoft.optim.transpose import FeedForward, Norm, transposed_product

JOINED = 1 << 23  # numbers of an error at the logits that are multiplied by the head's weight at a time
ROWS = 512  # that go back through a feed-forward part at a time: what lies between its maps stays in a cache
FEW = 64  # rows: with fewer, a map's weight takes longer to read than to compute with, and its output little room


@dataclass
class Guided:
    """Left factors from the output error, by one clean forward pass.

    `feed_forward` carries the error through the feed-forward parts, exactly, and gives their inner matrices factors
    too; `attention` does so for attention, its pattern held fixed, and the matrices that make its values (where torch's
    ``scaled_dot_product_attention`` computes it). Without both only the matrices that write into the stream have
    factors, and the stream counts as the identity. Then the error is the same for all of them, and with `two_pass` it
    is known before a second pass, in which each factor is taken as its layer is called: nothing is kept per layer. The
    closure must return a `Loss`.

    Raises:
        ValueError: `two_pass` with `feed_forward` or `attention`.
    """

    feed_forward: bool = True
    attention: bool = False
    two_pass: bool = False
    _stream: Stream | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.two_pass and (self.feed_forward or self.attention):
            raise ValueError(
                "two_pass keeps nothing to go through the blocks with: set feed_forward=False, and leave attention out"
            )

    def __call__(self, landscape: Landscape, estimate: Estimate) -> tuple[float, list[float]]:
        ranks = landscape.ranks
        if self._stream is None:
            found = find_stream(landscape.model, landscape.look)
            if ranks.any(found is None):
                return math.nan, [math.nan]
            self._stream = found
        stream = self._stream
        assert stream is not None
        landscape.reached = stream.reached(self.feed_forward, self.attention)
        writers = [] if self.two_pass else stream.writers
        norms = {writer.norm.module for writer in writers if writer.norm}
        parts = [writer.feed_forward for writer in writers if writer.feed_forward and self.feed_forward]
        attentions = [writer.attention for writer in writers if writer.attention and self.attention]
        readers = {part.reader for part in parts} | {attention.reader for attention in attentions}
        with _kept(landscape, writers, {stream.norm.module} | norms | readers, parts, attentions) as kept:
            loss = landscape.clean()
        if not math.isfinite(loss):
            return loss, [loss]
        if landscape.error is None:
            raise TypeError("the guided estimate needs the loss's slope: return a zoft.Loss (see zoft.cross_entropy)")
        way = _WayBack(landscape, estimate, kept, self.feed_forward, self.attention)
        error = way.to_end(stream, landscape.error())
        landscape.error = None  # the logits are no longer needed
        if self.two_pass:
            with _taken(landscape, estimate, stream.writers, error):
                landscape.forward()
        else:
            way.through(stream, error)
        estimate.factors = ranks.average(estimate.factors, landscape.losses.numel())
        return loss, []

    def __str__(self) -> str:
        return "guided"


@dataclass
class _Kept:
    """What a clean pass leaves behind at the positions read: a few rows a layer."""

    tokens: Tokens
    coordinates: dict[str, Tensor] = field(default_factory=dict)  # x A by map name, of writers and what is in outputs
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of inner maps of feed-forward parts, where rows are few
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)  # of norms, feed-forward parts and attention
    patterns: dict[str, tuple[Pattern, Tensor]] = field(default_factory=dict)  # of attention, by its values' map name,
    # and the inputs of the values, times A, as each head averages them [rows, H, r]

    def keep(self, name: str, x: Tensor, basis: Tensor | None, y: Tensor | None = None) -> None:
        """Keep what the factor of map `name` takes, the coordinates of `x` in `basis`, and its output `y`, if given."""
        if basis is not None:
            self.coordinates[name] = x.to(basis.device).float() @ basis
        if y is not None:
            self.outputs[name] = y

    def take(self, writer: Writer, error: Tensor, estimate: Estimate) -> Tensor:
        """Add the factor of `writer`, by the `error` at the stream; return the error at the writer's output."""
        error = error * writer.gain
        if writer.norm is not None:
            error = writer.norm.pull(self.inputs.pop(writer.norm.module), error)
        self.add_factor(writer.map.name, error, estimate)
        return error

    def add_factor(self, name: str, error: Tensor, estimate: Estimate) -> None:
        """Add the factor of map `name`, by the `error` at its output, if it has a basis."""
        coordinates = self.coordinates.pop(name, None)
        if coordinates is not None:
            estimate.add_factor(name, error.t() @ coordinates)


@contextmanager
def _kept(
    landscape: Landscape,
    writers: Sequence[Writer],
    modules: set[nn.Module],
    parts: Sequence[FeedForward] = (),
    attentions: Sequence[Attention] = (),
) -> Iterator[_Kept]:
    """While open, a forward pass leaves behind the coordinates of `writers`, the inputs of `modules`, and patterns.

    And what the inner maps of feed-forward `parts` give, if the loss reads few rows.
    """
    kept = _Kept(Tokens())
    values: list[tuple[str, Tensor]] = []  # the latest map of values that was called, and x A of all its tokens

    def see_map(name: str, inner: bool) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = None if inner and kept.tokens.count > FEW else kept.tokens.read(input_of(args, kwargs))
            if x is not None:
                kept.keep(name, x, landscape.branches.basis(name), kept.tokens.read(output) if inner else None)

        return see

    def see_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = kept.tokens.read(input_of(args, kwargs))
        if x is not None:
            kept.inputs[module] = x

    def see_values(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            basis, x = landscape.branches.basis(name), input_of(args, kwargs).to(output.device)
            projected = kept.tokens.by_example(x if basis is None else landscape.branches.project(x, basis))
            if projected is not None:  # without a basis the map is not trained, but the error goes through it
                values[:] = [(name, projected[..., :0] if basis is None else projected)]

        return see

    def see_attention(call: Attended) -> None:
        for name, coordinates in values:
            pattern = Pattern.of(call, kept.tokens, coordinates)
            if pattern is not None:
                kept.patterns[name] = pattern
        values.clear()

    with ExitStack() as handles:
        handles.callback(landscape.model.register_forward_pre_hook(kept.tokens.see, with_kwargs=True).remove)
        if attentions:
            handles.enter_context(attended(see_attention))
        for layer in (layer for part in parts for layer in part.inner):
            (module,) = layer.modules
            handles.callback(module.register_forward_hook(see_map(layer.name, inner=True), with_kwargs=True).remove)
        for attention in attentions:
            (module,) = attention.values.modules
            hook = see_values(attention.values.name)
            handles.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for writer in writers:
            (module,) = writer.map.modules
            hook = see_map(writer.map.name, inner=False)
            handles.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for module in modules:
            handles.callback(module.register_forward_pre_hook(see_input, with_kwargs=True).remove)
        yield kept


@contextmanager
def _taken(landscape: Landscape, estimate: Estimate, writers: Sequence[Writer], error: Tensor) -> Iterator[None]:
    """While open, a forward pass adds each writer's factor once it is called, for the same `error` at all of them."""

    def take(writer: Writer) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept.take(writer, error, estimate)

        return see

    with ExitStack() as handles:
        kept = handles.enter_context(_kept(landscape, writers, {w.norm.module for w in writers if w.norm}))
        for writer in writers:
            (last,) = [writer.norm.module] if writer.norm else writer.map.modules
            handles.callback(last.register_forward_hook(take(writer)).remove)
        yield


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
    """From the logits to the first block, over the rows kept."""

    landscape: Landscape
    estimate: Estimate
    kept: _Kept
    feed_forward: bool
    attention: bool

    def to_end(self, stream: Stream, at_logits: Tensor | Iterable[Tensor]) -> Tensor:
        """The error at the end of the stream, float32 [rows, d]; that at the logits may come in parts of positions."""
        head, parts = stream.head, [at_logits] if isinstance(at_logits, Tensor) else at_logits
        at_norm = torch.cat([self.transposed(head, part.to(head.device)) for part in _joined(parts, head)], dim=-2)
        rows = self.kept.tokens.read(at_norm)
        if rows is None:
            raise ValueError(
                f"the error at the logits is that of {tuple(at_norm.shape[:-1])} tokens, which is not the logits'"
            )
        device = stream.norm.gain.device
        return stream.norm.pull(self.kept.inputs[stream.norm.module].to(device), rows.to(device) * stream.scale)

    def through(self, stream: Stream, error: Tensor) -> None:
        """Add every factor, from the `error` at the end of the stream back to its beginning."""
        for block in reversed(stream.blocks):
            error = through = error.to(block.device)
            for writer in reversed(block.writers):
                at_output = self.kept.take(writer, error if block.parallel else through, self.estimate)
                if writer.attention is not None and self.attention:
                    through = through + self.attended(writer, writer.attention, at_output)
                if writer.feed_forward is not None and self.feed_forward:
                    through = through + self.fed_forward(writer.feed_forward, at_output)
            error = through

    def fed_forward(self, part: FeedForward, error: Tensor) -> Tensor:
        """The error at what `part` reads of the stream, for that at its output; adds the factors of its inner maps."""
        weights = [layer.weight for layer in (*part.inner, part.down)]
        at_hand = all(weight is not None and not weight.is_meta for weight in weights)  # else each part loads them
        together = ROWS if at_hand else len(error)
        parts = zip(self.kept.inputs[part.reader].split(together), error.split(together), strict=True)
        return torch.cat([self._fed_forward(part, h, at_output) for h, at_output in parts])

    def _fed_forward(self, part: FeedForward, h: Tensor, error: Tensor) -> Tensor:
        """The same for some rows `h` of the stream."""
        kept = self.kept
        if part.gate.name not in kept.outputs:
            x = h if part.norm is None else part.norm.module(h)
            for layer in part.inner:
                (module,) = layer.modules
                kept.keep(layer.name, x, self.landscape.branches.basis(layer.name), module(x))
        outputs = {layer.name: kept.outputs.pop(layer.name) for layer in part.inner}
        at_x, errors = part.pull(outputs, error, self.transposed)
        for name, at_output in errors.items():
            kept.add_factor(name, at_output, self.estimate)
        return _behind(part.norm, h, at_x)

    def attended(self, writer: Writer, attention: Attention, error: Tensor) -> Tensor:
        """The error at what `attention` reads of the stream, for that at the output of its `writer`; adds a factor."""
        name, columns = attention.values.name, attention.columns
        if name not in self.kept.patterns:
            return torch.zeros_like(error)
        pattern, averages = self.kept.patterns.pop(name)
        at_heads = self.transposed(writer.map, error).unflatten(1, (averages.shape[1], -1))
        if averages.shape[2]:
            factor = averages.new_zeros(attention.values.d_out, averages.shape[2])
            of_heads = torch.einsum("nhd,nhr->hdr", at_heads, averages).flatten(0, 1)
            self.estimate.add_factor(name, factor.index_add_(0, columns, of_heads))
        at_values = error.new_zeros(len(error), attention.values.d_out)
        at_values.index_add_(1, columns, pattern.pull(at_heads).flatten(1))
        at_x = self.transposed(attention.values, at_values)
        return _behind(attention.norm, self.kept.inputs[attention.reader], at_x)

    def transposed(self, layer: LinearMap, error: Tensor) -> Tensor:
        """``error W`` with the weight as it is in this pass, coefficients included."""
        product = transposed_product(layer, error)
        coefficients, basis = self.landscape.branches.factors.get(layer.name), self.landscape.branches.basis(layer.name)
        return product if coefficients is None or basis is None else product + error @ coefficients @ basis.t()
