"""1,000 phones that exchange seeds and scalars: the second case of scale.py, in small, with zoft's own steps.

Each phone holds a few private rows; together they train a small network by ZO-Act's coefficients, whose gradient has
D numbers. A phone's message is one finite difference, of its own direction or of the one that all share. Rows, answers,
dropouts and noise are seeded.
"""

from __future__ import annotations

import copy
import math
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from zoft.optim import SGD, Loss, ZeroOrder, ZOAct, replay
from zoft.optim.update import State, Tensors
from zoft.train.steplog import STEP, Step, append, names_of, new_log, read_log, read_step, write_step

PHONES, ROWS, FEATURES, HIDDEN, CLASSES, RANK = 1000, 4, 32, 128, 8, 8
ROUNDS, SEEDS = 60, (0, 1)
RATES = {True: (0.25, 1.0, 4.0, 16.0), False: (4.0, 16.0, 64.0, 256.0)}  # own directions, one shared
AWAY = (20, 50)  # the rounds that one phone misses
MEDIAN, SPREAD, DROPPED = 10.0, 0.6, 0.2  # seconds of a phone's round, log-normal; share that never answers


class World:
    """A frozen network, what the phones hold, and rows to judge by; labels are a teacher's, one in ten at random."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        scale = torch.arange(1, FEATURES + 1).rsqrt().double()
        teacher = self._normal(FEATURES, CLASSES)
        self.x = self._normal(PHONES + 500, ROWS, FEATURES) * scale + 0.5 * self._normal(PHONES + 500, 1, FEATURES)
        self.y = (self.x @ teacher).argmax(-1)
        wrong = torch.rand(self.y.shape, generator=self.generator) < 0.1
        self.y[wrong] = torch.randint(CLASSES, (int(wrong.sum()),), generator=self.generator)
        self.model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()
        for parameter in self.model.parameters():
            parameter.data = self._normal(*parameter.shape) / parameter.shape[-1] ** 0.5

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def optimizer(self, own: bool) -> ZeroOrder:
        """A replica of the model with its optimizer; `own`: every phone has a direction of its own."""
        replica = copy.deepcopy(self.model)
        optimizer = ZOAct(replica, eps=1e-4, rank=RANK, adam=False, per_example=own)
        optimizer.calibrate(lambda: replica(self.x[PHONES:].flatten(0, 1)).sum())  # on public rows, once
        return optimizer

    def losses(self, model: nn.Module, heard: Sequence[int]) -> Loss:
        """The mean loss of each of the phones `heard`, on its own rows."""
        found = nn.functional.cross_entropy(
            model(self.x[heard].flatten(0, 1)), self.y[heard].flatten(), reduction="none"
        )
        return Loss(found.view(-1, ROWS).mean(1), None, torch.arange(len(heard)).repeat_interleave(ROWS))

    @torch.no_grad()
    def judge(self, model: nn.Module) -> float:
        """The mean loss on rows of nobody who trains."""
        return float(self.losses(model, range(PHONES, PHONES + 500)).values.mean())

    def gradients(self, optimizer: ZeroOrder, heard: Sequence[int]) -> Tensor:
        """Each phone's exact gradient in the coefficients at 0, [phones, D]."""
        (first, second), (w1, b1, w2, b2) = optimizer.bases.values(), (p.detach() for p in self.model.parameters())

        def loss(c1: Tensor, c2: Tensor, x: Tensor, y: Tensor) -> Tensor:
            hidden = torch.tanh(x @ (w1 + c1 @ first.double().t()).t() + b1)
            return nn.functional.cross_entropy(hidden @ (w2 + c2 @ second.double().t()).t() + b2, y)

        zeros = (torch.zeros(HIDDEN, RANK).double(), torch.zeros(CLASSES, RANK).double())
        each = vmap(grad(loss, (0, 1)), (None, None, 0, 0))(*zeros, self.x[heard], self.y[heard])
        return torch.cat([part.flatten(1) for part in each], 1)


def dimensions(optimizer: ZeroOrder) -> int:
    """D, how many coefficients there are."""
    return sum(coefficients.numel() for coefficients in optimizer.coefficients.values())


# --- how much an estimate tells -----------------------------------------------------------------------------


def signal(world: World, own: bool, heard: int, estimates: int) -> dict[str, float]:
    """``|G|^2 / E|estimate|^2``, G the mean gradient of the phones heard: by formula, and found in many estimates."""
    optimizer, phones = world.optimizer(own), range(heard)
    each = world.gradients(optimizer, phones)
    mean, d = float(each.mean(0).square().sum()), dimensions(optimizer)
    expected = (d + 1) * float(each.square().sum(1).mean()) / heard + mean if own else (d + 2) * mean
    sizes = []
    for _ in range(estimates):
        optimizer.estimate(lambda: world.losses(optimizer.model, phones))
        found = optimizer.take_estimate()
        assert found is not None
        sizes.append(sum(float(factor.double().square().sum()) for factor in found.factors.values()))
    return {"phones": heard, "own": own, "formula": mean / expected, "found": mean / (sum(sizes) / len(sizes))}


# --- rounds --------------------------------------------------------------------------------------------------

Answer = Callable[[Tensor, Sequence[int]], Tensor]  # what is made of the phones' loss differences [phones]


def train(
    world: World,
    own: bool,
    heard: int,
    rate: float,
    rounds: int,
    seed: int = 0,
    answer: Answer = lambda differences, phones: differences,
    after: Callable[[Step, ZeroOrder], None] = lambda step, optimizer: None,
) -> float:
    """The loss after so many rounds, in each of which other `heard` phones answer; `after` is called with each.

    `rate` is in units of q / (D + q + 1), what of an estimate's squared size is the gradient's with q directions.
    """
    optimizer, random = world.optimizer(own), np.random.default_rng(seed)
    directions = heard if own else 1
    optimizer.seed, lr = seed, rate * directions / (dimensions(optimizer) + directions + 1)
    optimizer.param_groups[0]["lr"] = lr
    for number in range(rounds):
        phones, centre = random.choice(PHONES, heard, replace=False).tolist(), []

        def closure(phones: list[int] = phones, centre: list[Tensor] = centre) -> Loss:
            loss = world.losses(optimizer.model, phones)
            if not centre:
                centre.append(loss.values)
                return loss
            return loss._replace(values=centre[0] + answer(loss.values - centre[0], phones))

        optimizer.estimate(closure)
        step = Step(number, lr, optimizer.traces)
        optimizer.step()
        after(step, optimizer)
    return world.judge(optimizer.model)


def learned(world: World, own: bool, heard: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """The loss after `rounds`, mean over SEEDS, at the best of RATES."""
    losses = {
        rate: sum(train(world, own, heard, rate, rounds, seed) for seed in SEEDS) / len(SEEDS) for rate in RATES[own]
    }
    best = min(losses, key=lambda rate: losses[rate])
    return {"phones": heard, "own": own, "rate": best, "loss": losses[best]}


def poisoned(world: World, heard: int, liars: int, clip: bool, rounds: int = ROUNDS) -> float:
    """The loss if the first `liars` phones send -300 times what they found; `clip`: at 3 times the median size."""

    def answer(differences: Tensor, phones: Sequence[int]) -> Tensor:
        sent = torch.where(torch.tensor(phones) < liars, -300 * differences, differences)
        bound = 3 * sent.abs().median()
        return sent.clamp(-bound, bound) if clip else sent

    return train(world, True, heard, 1.0, rounds, answer=answer)


def checksum(optimizer: ZeroOrder) -> int:
    """CRC-32 of all coefficients: what phones compare now and then."""
    return zlib.crc32(b"".join(c.numpy().tobytes() for c in optimizer.coefficients.values()))


@dataclass(frozen=True)
class Unfused(SGD):
    """A processor that rounds a product before it adds it, where others round once."""

    rate: float = 0.0

    def __call__(self, estimates: Tensors, states: Sequence[State]) -> Tensors:
        return [estimate * self.rate for estimate in estimates]


def catch_up(world: World, own: bool, heard: int, away: tuple[int, int] = AWAY, rounds: int = ROUNDS) -> dict[str, Any]:
    """One phone misses the rounds ``away[0]`` to ``away[1]`` and takes them from the log; another is `Unfused`.

    Says whether the first ends bit for bit as all others, and of the second after how many rounds its
    checksum differs, and how far it is off in the end, relative to the largest coefficient.
    """
    here, elsewhere, sums, differs = world.optimizer(own), world.optimizer(own), [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.bin"
        path.write_bytes(new_log({}))
        sizes = [path.stat().st_size]

        def after(step: Step, optimizer: ZeroOrder) -> None:
            append(path, STEP, write_step(step, names_of(optimizer)))
            sizes.append(path.stat().st_size)
            sums.append(checksum(optimizer))
            if not away[0] <= step.number < away[1]:
                for record in read_log(path).records[1 + here.counters.steps :]:
                    replay(here, *read_step(record.body, names_of(here)))
                assert here.counters.steps == step.number + 1
            elsewhere.update = Unfused(into="coefficients", rate=step.lr)
            replay(elsewhere, step.number, 1.0, step.traces)
            differs.append(checksum(elsewhere) != sums[-1])

        train(world, own, heard, 1.0, rounds, after=after)
    pairs = zip(here.coefficients.values(), elsewhere.coefficients.values(), strict=True)
    return {
        "own": own, "phones": heard, "missed": away[1] - away[0], "bytes_a_round": sizes[1] - sizes[0],
        "bytes_missed": sizes[away[1]] - sizes[away[0]], "same_bits": checksum(here) == sums[-1],
        "elsewhere_differs_after": differs.index(True) + 1,
        "elsewhere_off": max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs),
    }  # fmt: skip


# --- the network ---------------------------------------------------------------------------------------------


def deadline(seconds: float, rounds: int = 200) -> dict[str, float]:
    """Rounds that end at a deadline: phones heard, by formula and found, and how long all who answer would take."""
    random = np.random.default_rng(0)
    times = MEDIAN * np.exp(SPREAD * random.standard_normal((rounds, PHONES)))
    answering = random.random((rounds, PHONES)) >= DROPPED
    expected = PHONES * (1 - DROPPED) * NormalDist().cdf(math.log(seconds / MEDIAN) / SPREAD)
    heard = float((answering & (times <= seconds)).sum(1).mean())
    last = float(np.where(answering, times, 0).max(1).mean())
    return {"deadline": seconds, "formula": expected, "heard": heard, "a_second": heard / seconds, "last": last}


# --- what the document quotes --------------------------------------------------------------------------------


def phones() -> dict[str, Any]:
    """The second case."""
    world = World()
    start = world.optimizer(True)
    return {
        "dimensions": dimensions(start),
        "start": world.judge(start.model),
        "signal": [signal(world, own, heard, 100) for heard in (10, 100, 1000) for own in (True, False)],
        "learned": [learned(world, own, heard) for heard in (10, 100, 1000) for own in (True, False)],
        "poisoned": {
            "honest": poisoned(world, 300, 0, False),
            "honest, clipped": poisoned(world, 300, 0, True),
            "10 of 1,000 lie": poisoned(world, 300, 10, False),
            "10 of 1,000 lie, clipped": poisoned(world, 300, 10, True),
        },
        "catch_up": [catch_up(world, own, 100) for own in (True, False)],
        "deadlines": [deadline(seconds) for seconds in (5.0, 10.0, 20.0, 40.0)],
    }


def tables(results: dict[str, Any]) -> list[str]:
    """The tables' lines."""
    lines = ["| phones heard | signal, own directions | one shared | loss, own | one shared |", "|---|---|---|---|---|"]
    signals = {(row["phones"], row["own"]): row for row in results["signal"]}
    losses = {(row["phones"], row["own"]): row["loss"] for row in results["learned"]}
    for heard in sorted({row["phones"] for row in results["learned"]}):
        cells = [signals.get((heard, own)) for own in (True, False)]
        told = ["–" if c is None else f"{c['formula']:.2e} ({c['found']:.2e})" for c in cells]
        lines.append(f"| {heard:,} | {' | '.join(told)} | {losses[heard, True]:.3f} | {losses[heard, False]:.3f} |")
    lines += ["", "| deadline | phones heard, formula | found | heard a second |", "|---|---|---|---|"]
    for row in results["deadlines"]:
        cells = f"{row['formula']:.1f} | {row['heard']:.1f} | {row['a_second']:.1f}"
        lines.append(f"| {row['deadline']:.0f} s | {cells} |")
    lines.append(f"| none | {PHONES * (1 - DROPPED):.1f} | – | {PHONES * (1 - DROPPED) / row['last']:.1f} |")
    lines += [
        "",
        "| 100 phones, one away for 30 rounds | bytes a round | to catch up | same bits |",
        "|---|---|---|---|",
    ]
    for row in results["catch_up"]:
        name, same = "own directions" if row["own"] else "one shared", "yes" if row["same_bits"] else "no"
        lines.append(f"| {name} | {row['bytes_a_round']:,} | {row['bytes_missed']:,} | {same} |")
    lines += ["", "| 300 phones a round | loss |", "|---|---|"]
    return lines + [f"| {name} | {loss:.3f} |" for name, loss in results["poisoned"].items()]
