"""Seconds of an optimizer's step against those of two plain forwards of the same batch.

All in one process and in turns, so that a machine that slows down slows all alike: a round runs the two forwards and
one step of each method, the next round begins one place further on. Medians are taken over the rounds.

A plain forward computes the logits that the loss reads and nothing else, in inference mode. `PUBLISHED` computes those
of every position, as its authors' code does.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from zoft.bench.published import PublishedMeZO
from zoft.data import losses, read_logits
from zoft.errors import UserError
from zoft.optim import Loss, NoStream, ZeroOrder
from zoft.options import parse_options
from zoft.train.batches import BatchLoss, task_closures
from zoft.train.config import TrainConfig
from zoft.train.optimizers import build

PUBLISHED = "mezo-published"
FORWARDS, BACKWARD, UPDATE, WHOLE = "forwards", "backward", "update", "whole"  # parts of a step
BARE = "bare"  # no part of it: hooks that stay in the model while it trains, put in and taken out for the other rows
PLAIN = "two plain forwards"

Batch = dict[str, Tensor]


class Clock:
    """The seconds of a step's parts, by name, in the order they ran, and how many forwards there were in them."""

    def __init__(self, device: torch.device) -> None:
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.more = 0  # forwards of which the clock was not told, blocks that ran again; below 0 for parts of one
        self._device = device

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self.parts[part].append(self._now() - start)

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


Step = Callable[[Clock], None]


def with_options(method: str) -> tuple[str, dict[str, Any]]:
    """A method's name and options, of ``agzo+rank=4+power_steps=1``."""
    name, *options = method.split("+")
    return name, parse_options(options)


def forwards(model: Any, batch: Batch, count: int) -> Step:
    """`count` plain forwards."""

    def run(clock: Clock) -> None:
        for _ in range(count):
            with clock(FORWARDS), torch.inference_mode():
                read_logits(model, batch)

    return run


def training_step(method: str, model: Any, batch: Batch, settings: Mapping[str, Any]) -> Step:
    """A step of `method` on `batch`, as `zoft train` makes it with `settings`; between steps the model is bare.

    `method` may have options, as `with_options` reads them.

    Raises:
        UserError: there is no such method, or it refuses the model (which the first step may find out).
    """
    if method == PUBLISHED:
        return _published_step(PublishedMeZO(model), model, batch)
    name, options = with_options(method)
    config = TrainConfig(**settings, method=name, method_options=options)
    network, optimizer = build(config, model)
    (closure,) = task_closures(network, [batch])
    if isinstance(optimizer, ZeroOrder):
        return _zero_order_step(method, optimizer, closure)
    return _first_order_step(optimizer, closure, torch.autocast(model.device.type, torch.bfloat16, config.autocast))


def _zero_order_step(method: str, optimizer: ZeroOrder, closure: BatchLoss) -> Step:
    branches = optimizer.branches
    branches.detach()

    def step(clock: Clock) -> None:
        def forward(part: Batch) -> Loss:
            with clock(FORWARDS):
                return closure.loss(part)

        with clock(BARE):
            if optimizer.stays_attached:
                branches.attach()
        before = optimizer.counters.forwards
        try:
            optimizer.estimate(BatchLoss(forward, closure.batch))
        except NoStream as error:
            raise UserError(f"method {method}: {error}") from error
        clock.more = optimizer.counters.forwards - before - len(clock.parts[FORWARDS])
        with clock(UPDATE):
            optimizer.step()
        with clock(BARE):
            branches.detach()

    return step


def _first_order_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Loss], autocast: torch.autocast) -> Step:
    def step(clock: Clock) -> None:
        with clock(FORWARDS), autocast:
            loss = closure().values.mean()
        with clock(BACKWARD):
            loss.backward()
        with clock(UPDATE):
            optimizer.step()
            optimizer.zero_grad()

    return step


def _published_step(optimizer: PublishedMeZO, model: Any, batch: Batch) -> Step:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}

    def step(clock: Clock) -> None:
        def loss() -> Tensor:
            with clock(FORWARDS):
                return losses(model(**inputs, use_cache=False).logits, batch).mean()

        optimizer.step(loss)

    return step


@dataclass
class Timing:
    """Seconds of one row, an entry a round: of the whole, and of its parts; and the `forwards` in a step."""

    whole: list[float] = field(default_factory=list)
    parts: list[dict[str, list[float]]] = field(default_factory=list)
    forwards: int = 0

    def breakdown(self) -> dict[str, Any]:
        """Medians of the seconds of each forward in turn, of the backward pass, the update, and the rest."""
        turns = zip(*(parts[FORWARDS] for parts in self.parts), strict=True)
        found: dict[str, Any] = {FORWARDS: [median(turn) for turn in turns]}
        for part in (BACKWARD, UPDATE):
            if part in self.parts[0]:
                found[part] = median(parts[part][0] for parts in self.parts)
        rest = [whole - sum(map(sum, parts.values())) for whole, parts in zip(self.whole, self.parts, strict=True)]
        return found | {"rest": median(rest)}


def time_steps(
    methods: Sequence[str],
    model: Any,
    batch: Batch,
    rounds: int,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, dict[str, Any]]:
    """The `summary` of each method on `model`, whose weights they all move, in the dtype that they have."""
    settings = {"model": model.name_or_path, "dtype": str(model.dtype).removeprefix("torch.")}
    rows = {method: training_step(method, model, batch, settings) for method in methods}
    found = take_turns(model.device, {PLAIN: forwards(model, batch, 2), **rows}, rounds, progress)
    return {method: summary(found[PLAIN], found[method]) for method in methods}


def take_turns(
    device: torch.device, rows: Mapping[str, Step], rounds: int, progress: Callable[[str], None] = lambda message: None
) -> dict[str, Timing]:
    """Time every row in `rounds` rounds, after one to warm up."""
    found = {name: Timing() for name in rows}
    names = [*rows]
    for number in range(rounds + 1):
        progress(f"round {number} of {rounds}" if number else "warming up")
        first = number % len(names)
        for name in names[first:] + names[:first]:
            clock = Clock(device)
            with clock(WHOLE):
                rows[name](clock)
            if number:
                found[name].whole.append(sum(clock.parts.pop(WHOLE)) - sum(clock.parts.pop(BARE, [])))
                found[name].parts.append(clock.parts)
                found[name].forwards = len(clock.parts[FORWARDS]) + clock.more
    return found


def summary(plain: Timing, found: Timing) -> dict[str, Any]:
    """What `found` comes to beside `plain`, two forwards a round: medians over the rounds.

    `ratio` is that of a step to the two forwards of its round, which holds even if the machine's speed changes halfway;
    `ratio_own_forwards` is to as many plain forwards as the method itself takes.
    """
    ratios = [step / two for step, two in zip(found.whole, plain.whole, strict=True)]
    low, ratio, high = quantiles(ratios, method="inclusive")
    return {
        "seconds_per_step": median(found.whole),
        "seconds_two_forwards": median(plain.whole),
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        "forwards_per_step": found.forwards,
        "ratio_own_forwards": ratio * 2 / found.forwards,
        "breakdown": found.breakdown(),
    }
