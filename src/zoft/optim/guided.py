"""The left factor computed instead of drawn: the error at the output, carried back along the residual stream.

At the positions whose logits the loss reads, the gradient at the logits is known (for cross-entropy, p - y). Head and
final norm carry it to the end of the residual stream, transposed and in closed form; the stream itself carries it back
almost unchanged, because every block adds to it: ``h_end = h_l + (what later blocks add)``. So for a matrix that writes
its input x into the stream, ``G ~ sum over positions of e x^T``, and its coefficients in a basis A of the inputs are
``C = sum of e (x A)^T``. Where a block's feed-forward part is known in closed form, the error is carried through it as
well, which gives its inner matrices their factors and corrects the error for the blocks before; where a block
normalises the stream itself, through that norm.

If it is asked for, the error is carried through attention as well (`zoft.optim.attention`), to all tokens, and the
matrices that make queries, keys and values have factors too. What that takes is much, so that the first pass keeps only
what each block was called with, and each runs again before the error goes back through it.

What is neglected is the way through attention, if it is not asked for, and with it the error at positions that the loss
does not read; and whatever is not known in closed form. So the estimate may be biased, but needs no probe: one forward
pass, or two. It is white-box (weights of the head and within the blocks are read, transposed) and asks the loss for its
slope at the logits. Of a loss that does not know it, or behind another head, autograd takes the slope at what the final
norm gives: of the blocks nothing is recorded, and the linear maps that follow learn from the gradient itself.

Relatives: feedback alignment (Lillicrap et al. 2016) and direct feedback alignment (Nøkland 2016) send errors back
through fixed matrices; the logit lens (nostalgebraist 2020) reads the stream through the head in the other direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

from torch import Tensor, nn

from zoft.optim.block import Writer
from zoft.optim.capture import Tokens
from zoft.optim.estimator import Estimate
from zoft.optim.gradients import Gradients
from zoft.optim.kept import Kept, called, keeping
from zoft.optim.landscape import Divisible, Landscape
from zoft.optim.loss import Differentiated
from zoft.optim.placement import unrounded
from zoft.optim.stream import Head, NoStream, Stream, find_stream
from zoft.optim.way_back import WayBack

SHARE = 64  # one such part of the weights' memory may what all blocks are called with take
WIDE = 8  # widths of the stream at a token: so much, about, holds the pass of a block at once
LEAST = 512  # tokens in a part of a batch: with fewer, each takes longer


@dataclass
class Guided:
    """Left factors from the output error, by one clean forward pass.

    `feed_forward` carries the error through the feed-forward parts, exactly, and gives their inner matrices factors
    too; `attention` does so for attention and the matrices that make its queries, keys and values (where torch's
    ``scaled_dot_product_attention`` computes it; else it changes nothing), for which every block runs a second time,
    so that it counts as two forwards; with `attention_after`, in the first step, which shows whether blocks can, and
    then only after so many steps. What all blocks were called with is held meanwhile: if that is more than a 64th of
    the weights' memory, a `Divisible` closure's batch goes through in parts, if it is long enough that each holds about
    as much as the pass of one block does of the whole batch (due bases, those of the whole batch, then take one pass
    more).

    Where few positions are read, most of the error that reaches a block through attention is at few tokens, too. Only
    the fewest that hold `energy` of its squared norm go through what treats each token alone: the feed-forward part and
    the map behind attention, in the second run and on the way back (attention itself is gone through at all tokens).
    The others' error passes such a block by along the stream. With an `energy` of 1 nothing is left out.

    Without both only the matrices that write into the stream have factors, and the stream counts as the identity. Then
    the error is the same for all of them, and with `two_pass` it is known before a second pass, in which each factor is
    taken as its layer is called: nothing is kept per layer.

    With `train_bases`, what is found for the bases is added to the estimate as well (`zoft.optim.gradients`), for which
    whole inputs are kept instead of their coordinates in the bases.

    Where the closure returns a `Loss` with its slope, and the logits come straight from a linear head that is not
    trained, all is in closed form. Else autograd takes the slope of the loss, back to the end of the stream and no
    further, and what follows it (a classifier) is trained by what it finds there.

    Raises:
        ValueError: `two_pass` with `feed_forward` or `attention`, `attention_after` without `attention`, or `energy` is
            no share.
        NoStream: when called, if the model has no stream, or what is to be trained is nothing that it reaches.
        NotRepeatable: when called with `attention`, if a block, run again, gives something else (dropout).
    """

    feed_forward: bool = True
    attention: bool = False
    two_pass: bool = False
    attention_after: int = 0
    train_bases: bool = False
    energy: float = 0.999
    _stream: Stream | None = field(default=None, repr=False)
    _head: Head | None = field(default=None, repr=False)  # at whose logits the closure gives its slope

    def __post_init__(self) -> None:
        if self.two_pass and (self.feed_forward or self.attention):
            raise ValueError(
                "two_pass keeps nothing to go through the blocks with: set feed_forward=False, and leave attention out"
            )
        if self.attention_after < 0 or (self.attention_after and not self.attention):
            raise ValueError("attention_after is a number of steps, and takes attention=True")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy is a share, above 0 and up to 1, not {self.energy}")

    def __call__(self, landscape: Landscape, estimate: Estimate) -> tuple[float, list[float]]:
        ranks, step = landscape.ranks, int(landscape.key[1])
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
        through_attention = self.attention and stream.attends and (step == 0 or step >= self.attention_after)
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
        for found in (*estimate.factors.values(), *estimate.bases.values()):
            found /= len(parts)
        return mean(losses), []

    def _carried(
        self, landscape: Landscape, estimate: Estimate, stream: Stream, through_attention: bool
    ) -> tuple[float, list[float]]:
        """The estimate from one forward pass, through attention two."""
        ranks, kept = landscape.ranks, Kept(Tokens(everywhere=through_attention))
        gradients = Gradients(landscape.branches, estimate, self.train_bases)
        if self._head is None:
            behind = {name: layer.module for name, layer in landscape.branches.named.items() if name in stream.behind}
            take = partial(_take, gradients)
            landscape.closure = Differentiated(landscape.closure, stream.norm.module, stream.times, behind, take)
        blocks = [] if self.two_pass or through_attention else stream.blocks
        with (
            keeping(landscape.model, gradients, kept, blocks, {stream.norm.module}, feed_forward=self.feed_forward),
            called(stream.blocks if through_attention else ()) as calls,
        ):
            loss = landscape.clean()
        if not math.isfinite(loss):
            return loss, [loss]
        if landscape.error is None:
            raise TypeError("the guided estimate needs the loss's slope, which the closure gave before")
        way = WayBack(landscape.model, gradients, kept, calls, self.feed_forward, through_attention, self.energy)
        with unrounded(stream.norm.gain.device):
            error = way.to_end(stream, self._head, landscape.error())
            landscape.error = None  # the logits are no longer needed
            if not self.two_pass:
                way.through(stream, error)
                landscape.forwards += int(through_attention)  # every block ran once more
        if self.two_pass:
            with _taken(landscape.model, gradients, stream, error):
                landscape.forward()
        estimate.factors = ranks.average(estimate.factors, landscape.losses.numel())
        estimate.bases = ranks.average(estimate.bases, landscape.losses.numel())
        return loss, []

    def __str__(self) -> str:
        return "guided"


@contextmanager
def _taken(model: nn.Module, gradients: Gradients, stream: Stream, error: Tensor) -> Iterator[None]:
    """While open, a forward pass adds what each writer learns as it is called, for one `error` at all of them."""
    kept = Kept()

    def take(writer: Writer) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept.take(writer, error, gradients)

        return see

    with ExitStack() as handles:
        handles.enter_context(keeping(model, gradients, kept, stream.blocks))
        for writer in stream.writers:
            (last,) = [writer.norm.module] if writer.norm else writer.map.modules
            handles.callback(last.register_forward_hook(take(writer)).remove)
        yield


def _take(gradients: Gradients, name: str, x: Tensor, error: Tensor) -> None:
    """Add what the map called `name` learns, by its input and the `error` at its output."""
    kept = gradients.keep(name, x)
    if kept is not None:
        gradients.add(name, kept, error)
