"""What a run leaves to zoft, settled by a look at the model and its batches: ``auto`` as method, lr, eps or option."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from zoft.errors import UserError
from zoft.optim import EstimateWarning, Guided, NoLinearLayers, NoStream, NotRepeatable
from zoft.optim.experts import find_experts
from zoft.optim.landscape import Closure
from zoft.train.adapter import Factors, start_from
from zoft.train.config import LOSS, TrainConfig
from zoft.train.diagnosis import Diagnosis, diagnose
from zoft.train.optimizers import AUTO, loadable, zero_order_of
from zoft.train.rate import guided_rate

BATCHES = 8  # looked at, at most
ROUNDS = 4  # of timing, the first to warm up
BATCHING = "probe_batching"


def settle(
    config: TrainConfig,
    model: Any,
    look: Callable[[], Sequence[Closure]],
    whole: bool = False,
    adapter: Factors | None = None,
) -> tuple[TrainConfig, Diagnosis | None]:
    """`config` without ``auto``, and the measurement behind its lr or eps, if they had to be measured.

    The method becomes `guided` if `model` has a residual stream to go back along (if it is to be the `whole` way,
    through attention as well, where blocks can run again, and its bases are trained, but for those of an `adapter` to
    go on from), else `zo-act`, which takes any weights, and experts that the adapter adds to. lr and eps are measured
    unless they are given, where training begins. `look` gives the losses of some batches, if they are needed; `model`
    stays as it is. Where the loss does not curve upwards there is no lr to measure for probes, and the method's own is
    taken; guided's has its own measure (`zoft.train.rate`). The option probe_batching becomes what is faster.

    Raises:
        UserError: lr or eps is to be measured, and cannot be, or probe_batching is wanted, and cannot be had; or probes
            are left, and the objective is not the loss.
    """
    batching = config.method_options.get(BATCHING)
    if AUTO not in (config.method, config.lr, config.eps) and not batching:
        return config, None
    closures = look()
    if batching:
        config = replace(config, method_options=config.method_options | {BATCHING: False})
        faster = _together_is_faster(config, model, closures[0], wanted=batching != AUTO)
        config, found = settle(config, model, lambda: closures, whole, adapter)
        return replace(config, method_options=config.method_options | {BATCHING: faster}), found
    unset: dict[str, Any] = {name: AUTO for name in ("lr", "eps") if getattr(config, name) is None}
    experts = {name for name, _ in find_experts(model)}
    if config.method == AUTO and not experts & (adapter or {}).keys():
        options = {"attention": True, "train_bases": not adapter} if whole else {}
        guided = replace(config, method="guided", method_options=options | config.method_options)
        try:
            lr = _guided_lr(replace(guided, **unset), model, closures[0], adapter)
            return replace(guided, lr=lr, eps=None if config.eps == AUTO else config.eps), None
        except NotRepeatable:
            return settle(config, model, lambda: closures, adapter=adapter)
        except (NoLinearLayers, NoStream):
            pass  # probes need neither
    if config.method == AUTO and config.objective != LOSS:
        raise UserError(
            f"objective {config.objective} has no slope by itself, and guided finds no residual stream here: choose a "
            "method with probes (--method zo-act, agzo, ...), an lr and an eps"
        )
    if config.method == AUTO:
        config = replace(config, method="zo-act", **unset)
    if AUTO not in (config.lr, config.eps):
        return config, None
    if config.method == "guided" and config.eps != AUTO:
        try:
            return replace(config, lr=_guided_lr(config, model, closures[0], adapter)), None
        except ValueError as error:
            raise UserError(f"method guided, lr auto: {error}") from error
    if len(closures) < 2:
        raise UserError(
            "lr and eps are measured on at least two batches: bring more rows, lower --batch-size, or set both"
        )
    try:
        found = diagnose(model, closures, partial(zero_order_of, replace(config, lr=0.0, eps=None), adapter=adapter))
    except ValueError as error:
        raise UserError(f"method {config.method}, lr or eps auto: {error}") from error
    if config.lr == AUTO:
        config = replace(config, lr=float(f"{found.lr:.1e}") if found.lr else None)
    return replace(config, eps=found.eps if config.eps == AUTO else config.eps), found


def _guided_lr(config: TrainConfig, model: Any, closure: Closure, adapter: Factors | None) -> Any:
    """The lr of `config`, measured if it is to be; None where the loss is not finite: then training will say so.

    Raises:
        NoLinearLayers, NoStream, NotRepeatable: guided cannot train the model.
    """
    optimizer = Guided(model, **loadable("guided", model, config.method_options))
    if adapter:
        start_from(optimizer, adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EstimateWarning)
            optimizer.estimate(closure)
        return guided_rate(optimizer, closure) if config.lr == AUTO else config.lr
    finally:
        optimizer.branches.detach()


def _together_is_faster(config: TrainConfig, model: Any, closure: Closure, wanted: bool) -> bool:
    """Whether an estimate takes less time with all its points in one forward; True if `wanted` and possible."""
    settings = replace(config, lr=0.0, eps=None if config.eps == AUTO else config.eps)
    choices = (True,) if wanted else (False, True)
    ways = [replace(settings, method_options=config.method_options | {BATCHING: way}) for way in choices]
    seconds: list[list[float]] = [[] for _ in ways]
    try:
        optimizers = [zero_order_of(way, model) for way in ways]
        for _ in range(1 if wanted else ROUNDS):
            for optimizer, taken in zip(optimizers, seconds, strict=True):
                if optimizer.stays_attached:
                    optimizer.branches.attach()
                start = time.perf_counter()
                optimizer.estimate(closure)  # ends with the loss on the CPU
                taken.append(time.perf_counter() - start)
                optimizer.take_estimate()
                optimizer.branches.detach()
    except (ValueError, UserError) as error:
        if wanted:
            raise UserError(f"option {BATCHING}: {error}") from error
        return False
    if wanted:
        return True
    together, apart = (optimizer.ranks.sum(torch.tensor(median(taken[1:]))) for taken in reversed(seconds))
    return bool(together < apart)
