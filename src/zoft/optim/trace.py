"""A step taken again from a few scalars: all that a step from probes owes to forward passes; the rest is noise."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoft.optim.apply import add
from zoft.optim.estimator import Estimate, Probes
from zoft.optim.probe import Direction
from zoft.optim.subspace import Activation

if TYPE_CHECKING:
    from zoft.optim.optimizer import ZeroOrder


@dataclass(frozen=True)
class Trace:
    """What an estimate from probes leaves behind.

    Of each direction in turn, `gradients` has the finite difference along it, float64 [], or [examples] if each had a
    direction of its own, and `still` the maps with a basis that no pass called. `shared` are the maps in which all
    examples moved in the first one's direction, `unread` the dense parameters that no pass read.
    """

    gradients: Sequence[Tensor]
    still: Sequence[Set[str]]
    shared: Set[str] = frozenset()
    unread: Set[str] = frozenset()


def trace_of(optimizer: ZeroOrder, found: Estimate, unread: Set[str]) -> Trace:
    """The trace of what `optimizer` has just `found`; empty if it was not found by probes."""
    active = {layer.name for layer in optimizer.branches.active}
    still = [active - direction.factors.keys() for direction, _ in found.probed]
    return Trace([gradient for _, gradient in found.probed], still, set(optimizer.branches.shared), set(unread))


@torch.no_grad()
def replay(optimizer: ZeroOrder, step: int, lr: float, traces: Sequence[Trace]) -> None:
    """Let `optimizer` take step number `step` again at rate `lr`, from the `traces` of its estimates: no forward.

    From the weights and the state of before that step, on the same kind of device, it is the same step bit for bit.

    Raises:
        ValueError: the step depends on more than these scalars (and on bases set once).
    """
    reason = obstacle(optimizer)
    if reason is not None:
        raise ValueError(reason)
    assert isinstance(optimizer.estimator, Probes)
    optimizer.counters.steps, optimizer.param_groups[0]["lr"] = step, lr
    optimizer.draw_bases()
    drawn = 0
    for one in traces:
        found = Estimate()
        for gradient, still in zip(one.gradients, one.still, strict=True):
            key, examples = (optimizer.seed, step, drawn), len(gradient) if gradient.dim() else None
            direction = Direction(key, examples, optimizer.confine)
            for layer in optimizer.branches.active:
                if layer.name not in still:
                    direction.left(layer, optimizer.bases[layer.name])
            found.probed.append((direction, gradient))
            drawn += 1
        optimizer.estimator.weigh(found, one.shared)
        add(optimizer, found, [float(gradient.mean()) for gradient in one.gradients], one.unread)
    optimizer.step()


def obstacle(optimizer: ZeroOrder) -> str | None:
    """Why the steps of `optimizer` cannot be taken again from their traces; None if they can."""
    subspace = optimizer.subspace
    if not isinstance(optimizer.estimator, Probes):
        return "its estimates are computed from activations: there are no scalars that a log could hold"
    if optimizer.fold_every > 1:
        return "its updates are written together, whenever the weights are asked for: no log holds that"
    if isinstance(subspace, Activation) and subspace.renew_every is not None:
        return "its bases come from the activations of its batches, again and again: no log holds those"
    return None
