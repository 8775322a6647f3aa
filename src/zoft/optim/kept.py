"""What a clean pass leaves behind for guided's way back: at the positions that the loss reads, a few rows a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim.alone import alone
from zoft.optim.attention import Attended, Pattern, attended
from zoft.optim.block import Block, Writer
from zoft.optim.capture import OfLastInput, Rows, Tokens
from zoft.optim.gradients import Gradients
from zoft.optim.landscape import uncompiled
from zoft.optim.layers import input_of
from zoft.optim.placement import autocast_dtype, device_of
from zoft.optim.recording import first_tensor
from zoft.optim.shelf import Shelf

ALL = slice(None)
ROUNDING = 0.05  # of a row's norm; in bfloat16, .008 was seen
FEW = 64  # rows: with fewer, a map's weight takes longer to read than to compute with, and its output little room


class NotRepeatable(ValueError):
    """A block gives something else when it is run again with what it was called with."""


@dataclass
class Kept:
    """Rows [rows, d] at the positions read.

    Of writers and of inner maps of feed-forward parts, `some` of them alone may be kept.
    """

    tokens: Tokens = field(default_factory=Tokens)
    some: Rows = field(default_factory=lambda: ALL)
    learned_from: dict[str, Tensor] = field(default_factory=dict)  # by map name, of writers and what is in outputs
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of inner maps of feed-forward parts and of attention
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)  # of norms, feed-forward parts and attention
    patterns: dict[str, Pattern] = field(default_factory=dict)  # of attention, by its values' map name
    shelf: Shelf = field(default_factory=Shelf)

    def take(self, writer: Writer, error: Tensor, gradients: Gradients) -> Tensor:
        """Add what `writer` learns, by the `error` at the stream; return the error at the writer's output."""
        error = error * writer.gain
        if writer.norm is not None:
            error = writer.norm.pull(self.of_some(self.inputs.pop(writer.norm.module)), error)
        inputs = self.learned_from.pop(writer.map.name, None)
        if inputs is not None:
            gradients.add(writer.map.name, inputs, error)
        return error

    def of_some(self, x: Tensor) -> Tensor:
        """`some` of all rows `x`."""
        return x[self.some]

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """All rows `x` and, where they are, `some` rows `y`."""
        found = x.clone()
        found[self.some] += y
        return found

    def everywhere(self, y: Tensor) -> Tensor:
        """`some` rows `y`, and zeros for the others."""
        return self.added(y.new_zeros(self.tokens.count, y.shape[1]), y)


@contextmanager
def keeping(
    model: nn.Module,
    gradients: Gradients,
    kept: Kept,
    blocks: Sequence[Block],
    modules: Set[nn.Module] = frozenset(),
    *,
    feed_forward: bool = False,
    attention: bool = False,
) -> Iterator[None]:
    """While open, a forward pass leaves in `kept` what the way back through `blocks` takes, and inputs of `modules`.

    With `feed_forward` and `attention`, that is what the way through the parts takes which end in these. `attention` is
    meant for one block at a time; without it, what inner maps of feed-forward parts give is kept only of few rows.
    """
    writers = [writer for block in blocks for writer in block.writers]
    parts = [writer.feed_forward for writer in writers if writer.feed_forward and feed_forward]
    attentions = [writer.attention for writer in writers if writer.attention and attention]
    norms = {writer.norm.module for writer in writers if writer.norm}.union(*(block.norms for block in blocks))
    readers = {part.reader for part in parts} | {part.reader for part in attentions}
    tokens, last = kept.tokens, OfLastInput[Tensor | None]()
    some = tokens.some(kept.some)
    everywhere = {name for part in attentions for name in part.maps}
    values: list[str] = []  # the latest map of values that was called

    def read_some(x: Tensor) -> Tensor | None:
        by_themselves = isinstance(kept.some, Tensor) and x.shape[:-1] == (some.count,)
        return x.detach() if by_themselves else some.read(x)

    def see_map(name: str, inner: bool) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = input_of(args, kwargs)
            read = tokens.read if name in everywhere else read_some
            x = None if inner and tokens.count > FEW and not attention else last.get(given, lambda: read(given))
            y = read(output) if inner and x is not None else None
            inputs = None if x is None else gradients.keep(name, x)
            if inputs is not None:
                kept.learned_from[name] = kept.shelf.put(inputs)
            if y is not None:
                kept.outputs[name] = kept.shelf.put(y)

        return see

    def see_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = tokens.read(input_of(args, kwargs))
        if x is not None:
            kept.inputs[module] = kept.shelf.put(x)

    def see_values(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            values[:] = [name]

        return see

    def see_attention(call: Attended) -> None:
        pattern = Pattern.of(call, tokens)
        if pattern is not None:
            kept.patterns.update((name, pattern) for name in values)
        values.clear()

    with ExitStack() as handles:
        handles.callback(model.register_forward_pre_hook(tokens.see, with_kwargs=True).remove)
        if attentions:
            handles.enter_context(attended(see_attention))
        inner = {layer.name: layer for part in parts for layer in part.inner}
        for part in attentions:
            inner |= part.maps
            (module,) = part.values.map.modules
            handles.callback(module.register_forward_hook(see_values(part.values.map.name)).remove)
        for layer in inner.values():
            (module,) = layer.modules
            handles.callback(module.register_forward_hook(see_map(layer.name, inner=True), with_kwargs=True).remove)
        for writer in writers:
            (module,) = writer.map.modules
            hook = see_map(writer.map.name, inner=False)
            handles.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for module in modules | norms | readers:
            handles.callback(module.register_forward_pre_hook(see_input, with_kwargs=True).remove)
        if isinstance(kept.some, Tensor):
            handles.enter_context(alone(some, [writer for block in blocks for writer in block.row_by_row]))
        yield


@dataclass(frozen=True)
class BlockCall:
    """What a block was called with, to run it again, and the stream after it, which is the next block's input too."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | None
    autocast: torch.dtype | None

    def again(self, block: Block, tokens: Tokens) -> None:
        """Run `block` as it ran.

        Raises:
            NotRepeatable: it gives something else for what `tokens` reads, because of dropout or a memory of its own.
        """
        rounded = torch.autocast(block.device.type, self.autocast) if self.autocast else nullcontext()
        with uncompiled(), rounded:
            output = first_tensor(block.module(*self.args, **self.kwargs))
        before, found = tokens.read(self.output), tokens.read(output)
        if before is None or found is None or not _alike(before, found):
            raise NotRepeatable(
                f"{type(block.module).__name__} gives something else when it is run again, so guided cannot go back "
                "through its attention: set the model to eval mode if it has dropout, else leave attention out"
            )


def _alike(before: Tensor, found: Tensor) -> bool:
    """Whether rows are the same but for rounding, which differs with the number of rows that are computed together."""
    off = torch.linalg.vector_norm(found.float() - before.float(), dim=1)
    return bool((off <= ROUNDING * torch.linalg.vector_norm(before.float(), dim=1)).all())


@contextmanager
def called(blocks: Sequence[Block]) -> Iterator[dict[nn.Module, BlockCall]]:
    """While open, a forward pass leaves behind how each of `blocks` was called, without a cache of keys and values."""
    calls: dict[nn.Module, BlockCall] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = (*(_no_cache(value) for value in args),), {name: _no_cache(value) for name, value in kwargs.items()}
        calls[module] = BlockCall(*inputs, first_tensor(output), autocast_dtype(device_of(module)))

    with ExitStack() as handles:
        for block in blocks:
            handles.callback(block.module.register_forward_hook(see, with_kwargs=True).remove)
        yield calls


def _no_cache(value: Any) -> Any:
    """`value`, or None for transformers' caches, to which running a block again would add."""
    return None if hasattr(value, "get_seq_length") else value
