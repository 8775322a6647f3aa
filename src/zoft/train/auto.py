"""What a run leaves to zoft, settled by a look at the model and its batches: ``auto`` as method, lr or eps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from zoft.errors import UserError
from zoft.optim import EstimateWarning, Guided, NoLinearLayers, NoStream
from zoft.optim.landscape import Closure
from zoft.train.config import TrainConfig
from zoft.train.diagnosis import Diagnosis, diagnose
from zoft.train.optimizers import AUTO, zero_order_of

BATCHES = 8  # looked at, at most


def settle(
    config: TrainConfig, model: Any, look: Callable[[], Sequence[Closure]]
) -> tuple[TrainConfig, Diagnosis | None]:
    """`config` without ``auto``, and the measurement behind its lr or eps, if they had to be measured.

    The method becomes `guided` if `model` has a residual stream for it to go back along, else `zo-act`, which takes
    any weights, with lr and eps measured unless they are given. `look` gives the losses of some batches, if they
    are needed; `model` stays as it is. Where the loss does not curve upwards there is no lr to measure, and the
    method's own is taken.

    Raises:
        UserError: lr or eps is to be measured, and cannot be.
    """
    if AUTO not in (config.method, config.lr, config.eps):
        return config, None
    closures = look()
    if config.method == AUTO:
        if _has_stream(model, closures[0]):
            config = replace(config, method="guided")
        else:
            unset: dict[str, Any] = {name: AUTO for name in ("lr", "eps") if getattr(config, name) is None}
            config = replace(config, method="zo-act", **unset)
    if AUTO not in (config.lr, config.eps):
        return config, None
    if len(closures) < 2:
        raise UserError(
            "lr and eps are measured on at least two batches: bring more rows, lower --batch-size, or set both"
        )
    try:
        found = diagnose(model, closures, partial(zero_order_of, replace(config, lr=0.0, eps=None)))
    except ValueError as error:
        raise UserError(f"method {config.method}, lr or eps auto: {error}") from error
    if config.lr == AUTO:
        config = replace(config, lr=float(f"{found.lr:.1e}") if found.lr else None)
    return replace(config, eps=found.eps if config.eps == AUTO else config.eps), found


def _has_stream(model: Any, closure: Closure) -> bool:
    """Not known where the loss is not finite: then training will say so, whatever the method."""
    try:
        optimizer = Guided(model)
    except NoLinearLayers:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EstimateWarning)
            optimizer.estimate(closure)
    except NoStream:
        return False
    finally:
        optimizer.branches.detach()
    return True
