"""From estimates to moved parameters."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import TYPE_CHECKING

import torch

from zoft.optim.counters import EstimateWarning
from zoft.optim.estimator import Estimate
from zoft.optim.noise import Key
from zoft.optim.write import add_dense_, add_noise_

if TYPE_CHECKING:
    from zoft.optim.optimizer import ZeroOrder

FASTER = 2  # bases than coefficients, as LoRA's are, which begin at random: docs/guided.md
LAYERS = 32  # moved together: as many have copies of their estimates at a time


def add(optimizer: ZeroOrder, found: Estimate, gradients: list[float], unread: Set[str]) -> None:
    """Add what was `found`, by projected `gradients`, to the estimates since the last step, if it is sound.

    Parameters that were `unread` stay still.
    """
    optimizer.projected_gradients, optimizer.unused = gradients, unread
    if optimizer.unused:
        optimizer._warn(
            "unused",
            f"{len(optimizer.unused)} parameters are not read through their own module and stay "
            f"still, for instance {min(optimizer.unused)}",
        )
    total = optimizer._estimate = optimizer._estimate or Estimate()
    finite = [g for g in gradients if math.isfinite(g)]
    # Of examples with directions of their own each one's counts: their mean may be 0 though none of them is.
    sound = [along for _, along in found.probed if math.isfinite(along.mean())]
    slopes = torch.cat([along.reshape(-1) for along in sound]).tolist() if sound else finite
    if gradients and not finite:
        optimizer.counters.skipped += 1
        message = "the loss is not finite; the estimate was skipped. Try a smaller lr or eps"
        optimizer._warn("skipped", message, EstimateWarning)
    elif finite and not any(slopes):
        optimizer.counters.zero += 1
        optimizer._warn("zero", "the loss did not change under the perturbation; try a larger eps", EstimateWarning)
    else:
        total.merge(found, optimizer.pace(slopes) if finite else 1.0)


def apply(optimizer: ZeroOrder, estimate: Estimate) -> None:
    """Move everything that `optimizer` trains along the mean of what was added to `estimate`, by its update rule."""
    (group,) = optimizer.param_groups
    lr, decay = group["lr"], 1 - group["lr"] * group["weight_decay"]
    moved = [layer.name for layer in optimizer.maps if layer.name in estimate.factors]
    for start in range(0, len(moved), LAYERS):
        names = moved[start : start + LAYERS]
        means = torch._foreach_div([estimate.factors[name] for name in names], estimate.count)
        moves = optimizer.update(means, [optimizer.updates.setdefault(name, {}) for name in names])
        if optimizer.keeps_coefficients:
            coefficients = [optimizer.coefficients[name] for name in names]
            torch._foreach_mul_(coefficients, decay)
            torch._foreach_add_(coefficients, moves, alpha=-lr)
        else:
            for name, move in zip(names, torch._foreach_mul(moves, -lr), strict=True):
                optimizer.pending.add(name, move, optimizer.bases[name], decay)
    _move_bases(optimizer, estimate, lr)
    optimizer.pending.end_step()
    if optimizer.pending.steps >= optimizer.fold_every:
        optimizer.fold()
    for name, parameter in optimizer.dense.items():
        if name in optimizer.unused:
            continue
        shrink, rounding = decay if parameter.dim() > 1 else 1.0, (*rounding_key(optimizer), name)
        terms = [((*key, name), c / estimate.count) for key, c in estimate.dense]
        if optimizer.update.stateless:
            add_noise_(parameter, [(key, -lr * c) for key, c in terms], rounding, shrink)
        else:
            gradient = torch.zeros_like(parameter, dtype=torch.float32)
            add_noise_(gradient, terms, ())
            (move,) = optimizer.update([gradient], [optimizer.updates.setdefault(name, {})])
            add_dense_(parameter, move * -lr, rounding, shrink)


def _move_bases(optimizer: ZeroOrder, estimate: Estimate, lr: float) -> None:
    """Move bases that are trained."""
    owners = list(estimate.bases)
    for start in range(0, len(owners), LAYERS):
        names = owners[start : start + LAYERS]
        means = torch._foreach_div([estimate.bases[name] for name in names], estimate.count)
        moves = optimizer.update(means, [optimizer.basis_updates.setdefault(name, {}) for name in names])
        optimizer.branches.move_bases(names, torch._foreach_mul(moves, -lr * FASTER))


def rounding_key(optimizer: ZeroOrder) -> Key:
    """What prefixes the streams of the rounding in this step."""
    return (optimizer.seed, optimizer.counters.steps, "rounding")
