"""What does not fit together is said when an optimizer is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from zoft.optim.estimator import Estimator, Probes
from zoft.optim.guided import Guided
from zoft.optim.layers import LinearMap
from zoft.optim.placement import is_hooked, is_sharded
from zoft.optim.ranks import Ranks
from zoft.optim.subspace import Activation, Full, Subspace
from zoft.optim.update import Update


def numbers(lr: float, eps: float, weight_decay: float) -> None:
    """Raises ValueError if one is out of its range."""
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a number of at least 0, not {value}")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be above 0, not {eps}")


def patterns(**given: Sequence[str]) -> None:
    """Raises ValueError if one is no list of patterns: of a string, every letter would be one."""
    for name, value in given.items():
        if isinstance(value, str):
            raise ValueError(f"{name} must be a list of patterns, such as [{value!r}]")


def axes(subspace: Subspace, estimator: Estimator, update: Update, others: str) -> None:
    """Raises ValueError if one asks of another what it does not have."""
    if others not in ("frozen", "gaussian"):
        raise ValueError(f"others must be 'frozen' or 'gaussian', not {others!r}")
    if update.into == "coefficients":
        if not (isinstance(subspace, Activation) and subspace.renew_every is None):
            raise ValueError("coefficients need a basis that stays: Activation(renew_every=None)")
        if others != "frozen":
            raise ValueError("coefficients leave every other parameter frozen: others must be 'frozen'")
    elif isinstance(estimator, Guided) and estimator.train_bases:
        raise ValueError("bases are trained with the coefficients: train_bases takes into='coefficients'")


def writable(model: nn.Module, maps: Sequence[LinearMap], dense: dict[str, nn.Parameter], update: Update) -> None:
    """Raises ValueError if a weight cannot be written."""
    weights: list[tuple[str, Tensor | None]] = [*((layer.name, layer.weight) for layer in maps), *dense.items()]
    away = [name for name, weight in weights if weight is not None and weight.is_meta]
    for kind, names in (
        ("an offloaded", away if is_hooked(model) else []),
        ("a sharded", [layer.name for layer in maps if is_sharded(layer.fused)]),
        ("a computed or quantized", [layer.name for layer in maps if layer.weight is None]),
    ):
        if names:
            raise ValueError(
                f"{names[0]!r} (and {len(names) - 1} more) has {kind} weight, which cannot be written: train "
                "coefficients instead (ZOAct), or exclude it"
            )
    sharded = [name for name, parameter in dense.items() if is_sharded(parameter)]
    if sharded and not update.stateless:
        raise ValueError(
            f"{sharded[0]!r} is sharded, and an update with a state (momentum, Adam) moves only matrices in shards: "
            "leave the other parameters frozen, or take plain SGD"
        )


def ranks(ranks: Ranks, estimator: Estimator, maps: Sequence[LinearMap]) -> None:
    """Raises ValueError if several processes cannot take one step."""
    if ranks.groups > 1:
        if not isinstance(estimator, Probes):
            raise ValueError(f"{estimator} has no probes that processes could share: leave parallel at 'data'")
        if estimator.points < ranks.groups:
            raise ValueError(f"{ranks.groups} groups of processes share {estimator.points} points: raise `probes`")
    if ranks.count > 1 and getattr(estimator, "per_example", False):
        raise ValueError("per-example probes are for one process: each example's direction is known to its own alone")
    if ranks.parts > 1 and any(layer.fused is not None for layer in maps):
        raise ValueError(
            "processes with parts of a batch would each see tokens of other experts, and wait for one another: "
            "exclude=['*experts*'], or parallel='probes'"
        )


def sharded(ranks: Ranks, estimator: Estimator) -> None:
    """Raises ValueError if processes that gather weights together would not make the same passes, and wait."""
    if not isinstance(estimator, Probes):
        raise ValueError("guided reads weights between forwards, when they lie in shards: take probes (ZOAct)")
    if estimator.points % ranks.groups:
        raise ValueError(f"{ranks.groups} groups of processes cannot share {estimator.points} points evenly")


def unmoved(model: nn.Module, sharded: bool) -> None:
    """Raises ValueError if the model, whose weights were `sharded` or not, has others by now."""
    together = dist.is_available() and dist.is_initialized()  # else there are no shards, and a look at all is saved
    if together and any(map(is_sharded, model.parameters())) != sharded:
        raise ValueError("the model was sharded after the optimizer was made, which has its old weights: make it anew")


def folding(every: int, subspace: Subspace, estimator: Estimator, update: Update) -> None:
    """Raises ValueError if updates are to be held back that cannot be."""
    if every < 1:
        raise ValueError(f"fold_every must be at least 1, not {every}")
    if every > 1 and (isinstance(subspace, Full) or update.into == "coefficients" or not isinstance(estimator, Probes)):
        raise ValueError("fold_every is for low-rank updates, by probes, that are written into the weights")


def probing(
    subspace: Subspace, estimator: Estimator, others: str, *, clip: float | None, normalise: bool, batching: bool
) -> None:
    """Raises ValueError if what is for probes, or for low-rank ones, is asked of others."""
    if not isinstance(batching, bool):
        raise ValueError(f"probe_batching must be True or False, not {batching!r} (which zoft train settles)")
    if (clip is not None or normalise or batching) and not isinstance(estimator, Probes):
        raise ValueError("clip, normalise and probe_batching are for probes, of which this estimator has none")
    dense = isinstance(subspace, Full) or others == "gaussian"
    if dense and isinstance(estimator, Guided):
        raise ValueError("guided moves linear layers within a basis alone: no Full() subspace, and others='frozen'")
    if batching and dense:
        raise ValueError("probe_batching takes low-rank directions: leave the other parameters frozen")
