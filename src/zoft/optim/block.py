"""A block of a transformer: what joins the residual stream there, found by looking at what flows through it.

The change of the stream over the block is regressed on the outputs of the modules within: those that carry it are its
writers. Where a block normalises the stream itself (BERT's kind), this is done from one norm to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoft.optim.inside import Attention, attention_of, feed_forward_of, norm_before
from zoft.optim.layers import LinearMap
from zoft.optim.placement import device_of
from zoft.optim.recording import Call, Recording, exact, is_leaf, same
from zoft.optim.transpose import FeedForward, Norm

Part = tuple[Call, float]  # whose output, times the number, joins the stream


@dataclass(frozen=True)
class Writer:
    """A linear map whose output joins the stream times `gain`, after `norm` if there is one."""

    map: LinearMap
    gain: float
    norm: Norm | None
    feed_forward: FeedForward | None  # what computes the map's input, if it is this and known in closed form
    attention: Attention | None = None  # or this


@dataclass(frozen=True)
class Block:
    """`steps` of the stream through it, in order: writers that join it, and norms that it goes through itself.

    In a `parallel` block the feed-forward part reads the stream before the other writers have joined it.
    """

    module: nn.Module
    steps: list[Writer | Norm]
    parallel: bool

    @property
    def writers(self) -> list[Writer]:
        """Of all steps."""
        return [step for step in self.steps if isinstance(step, Writer)]

    @property
    def norms(self) -> set[nn.Module]:
        """Those of the stream itself."""
        return {step.module for step in self.steps if isinstance(step, Norm)}

    @property
    def row_by_row(self) -> list[Writer]:
        """The writers behind whose inputs nothing in the block looks from one token at another."""
        writers = self.writers
        if self.norms:
            return []
        if self.parallel:
            return writers
        return writers[max((i for i, writer in enumerate(writers) if writer.feed_forward is None), default=0) :]

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return device_of(*(module for writer in self.writers for module in writer.map.modules), self.module)


def block_of(call: Call, seen: Recording, maps: dict[str, LinearMap], last: nn.Module) -> Block | None:
    """The block that was called, among all calls `seen`; without the norm `last`, if it ends with this one.

    None if it normalises the stream, and it is not known of what.
    """
    inside = seen.within(call.name)
    steps = _steps(call, inside, maps)
    if steps is None:
        return None
    if steps and isinstance(steps[-1], Norm) and steps[-1].module is last:
        steps.pop()
    readers = {step.feed_forward.reader for step in steps if isinstance(step, Writer) and step.feed_forward}
    parallel = any(other.module in readers and same(other.x, call.x) for other in inside.calls)
    return Block(call.module, steps, parallel)


def _steps(block: Call, inside: Recording, maps: dict[str, LinearMap]) -> list[Writer | Norm] | None:
    """The way of the stream through `block`, from its end to its beginning, a section from one norm to the next."""
    steps: list[Writer | Norm] = []
    state, before = block.y, inside.calls
    states = [block.x, *_normalised(block, inside.calls, maps)]
    while not same(state, block.x):
        norm, joined = norm_before(state, before)
        if norm is not None:
            before = before[: next(i for i, call in enumerate(before) if call.module is norm.module)]
        section = _section(states, joined, before, maps)
        if section is None:
            return None if norm is not None or steps else []
        start, parts = section
        steps = [*_writers(start, parts, inside, maps), *([norm] if norm is not None else []), *steps]
        state = start
    return steps


def _normalised(block: Call, inside: list[Call], maps: dict[str, LinearMap]) -> list[Tensor]:
    """What the norms give that read the stream, not what something else within the block gives."""
    alike = [call for call in inside if call.y.shape == block.y.shape and call.name not in maps]
    norms = [call for call in alike if norm_before(call.y, [call])[0] is not None]
    return [norm.y for norm in norms if not any(same(call.y, norm.x) for call in inside if call is not norm)]


def _section(
    states: list[Tensor], joined: Tensor, calls: list[Call], maps: dict[str, LinearMap]
) -> tuple[Tensor, list[Part]] | None:
    """Which of the stream's `states` the section starts with that ends as `joined`, and what joins it; None if none."""
    if same(states[0], joined):  # a norm is the first thing in the block
        return joined, []
    found = ((start, _parts(start, joined, states, calls, maps)) for start in states)
    return next((section for section in found if section[1]), None)


def _writers(start: Tensor, parts: list[Part], inside: Recording, maps: dict[str, LinearMap]) -> list[Writer]:
    """The linear maps whose outputs, times something, are the `parts` that join the stream after `start`."""
    states = [exact(start)]  # of the stream, as the writers join it
    writers = []
    for joining, gain in parts:
        source: Call | None = joining
        norm: Norm | None = None
        if joining.name not in maps:  # perhaps a norm between the writer and the stream
            norm = Norm.of(joining.module, joining.x) if is_leaf(joining.module) else None
            source = next(
                (c for c in inside.calls if c.name in maps and norm is not None and same(c.y, joining.x)), None
            )
        if source is not None:
            attention = attention_of(source, inside, maps, states)
            feed_forward = None if attention else feed_forward_of(source, inside.calls, maps, states)
            writers.append(Writer(maps[source.name], gain, norm, feed_forward, attention))
        states.append(states[-1] + gain * exact(joining.y))
    return writers


def _parts(
    start: Tensor, end: Tensor, states: list[Tensor], inside: list[Call], maps: dict[str, LinearMap]
) -> list[Part]:
    """What joins the stream between `start` and `end`; nothing, if that is not the outputs of some calls.

    What a call gives that is one of the `states` of the stream is no part.
    """
    distinct: list[Call] = []
    for call in sorted(inside, key=lambda call: call.name not in maps):  # of equal outputs, a linear map's is taken
        known = [end, *states, *(other.y for other in distinct)]
        if call.y.shape == end.shape and not any(same(call.y, output) for output in known):
            distinct.append(call)
    # An outer module may add up inner ones: which of them a regression on all takes is left to rounding.
    inmost = [call for call in distinct if not any(other.name.startswith(f"{call.name}.") for other in distinct)]
    parts = _summands(start, end, inmost) or _summands(start, end, distinct)
    return sorted(parts, key=lambda part: inside.index(part[0]))


def _summands(start: Tensor, end: Tensor, calls: list[Call]) -> list[Part]:
    """As few of `calls` as add up to the difference between `start` and `end`, with their gains."""
    if not calls:
        return []
    added = (exact(end) - exact(start)).flatten()
    outputs = torch.stack([exact(call.y).flatten() for call in calls], dim=1)
    sizes = _least_squares(outputs, added).abs() * outputs.norm(dim=0)
    finest, coarsest = (torch.finfo(dtype).eps for dtype in (end.dtype, calls[0].y.dtype))  # under autocast
    rounding = 2 * (finest * exact(end).norm() + max(finest, coarsest) * added.norm())
    order = sizes.argsort(descending=True)
    for count in range(max(1, int((sizes > 0.02 * added.norm()).sum())), len(calls) + 1):
        chosen = order[:count]
        gains = _least_squares(outputs[:, chosen], added)
        if (added - outputs[:, chosen] @ gains).norm() <= rounding:
            # Rounding is the batch's, and a resumed run sees another.
            gains = torch.where((gains - 1).abs() < 0.02, 1.0, gains)
            return [(calls[i], gain) for i, gain in zip(chosen.tolist(), gains.tolist(), strict=True)]
    return []


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    scale = a.norm(dim=0).clamp(min=1e-30)
    return torch.linalg.lstsq(a / scale, b.unsqueeze(1), driver="gelsd").solution.squeeze(1) / scale
