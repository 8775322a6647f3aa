"""Is the guided estimate worth correcting? Probes on top of it, and a line search, measured at equal cost.

    python benchmarks/corrections.py --data DATA/sst2

SmolLM2-135M-Instruct on SST-2, batches of 16. First the cosine to the true gradient (float32, three batches) of the
guided estimate C and of what two more forwards could make of it; R is drawn anew, g the finite difference along it:

- control variate: ``C + (g - <C, R>) R``, unbiased on the subspace whatever C is;
- the same, shrunk: the correction times ``1 / D``, D the number of coefficients, for which its own noise is as large as
  what it corrects;
- guided covariance: the probe drawn around C, ``R' = C / |C| + R / sqrt(D)``, and the estimate ``g R'``.

Then 120 forwards of training (bfloat16): plain steps, against a search over a third, one and three times the learning
rate on the step's own batch, which takes four forwards a step. Writes results/corrections.json.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LinearLR

import zoft
from zoft.bench import align
from zoft.data import load_rows, load_task, sample
from zoft.optim import SGD, Activation
from zoft.optim.estimator import Estimate, add_to
from zoft.optim.guided import Guided
from zoft.optim.landscape import Landscape
from zoft.optim.methods.zoact import HEADS
from zoft.train import load_model, task_batches, task_closures
from zoft.train.files import write_json

BATCH, HELD, FORWARDS, TRIED = 16, 3, 120, (1 / 3, 1.0, 3.0)
EPS = 3e-3


@dataclass
class Corrected:
    """The guided estimate and two forwards more, as `how` says."""

    how: str
    guided: Guided = field(default_factory=Guided)

    def __call__(self, landscape: Landscape, estimate: Estimate) -> tuple[float, list[float]]:
        found = Estimate()
        loss, _ = self.guided(landscape, found)
        direction = landscape.draw()
        for name, factor in found.factors.items():
            left = direction.left(landscape.branches.named[name], landscape.branches.bases[name])
            if self.how == "guided covariance":
                direction.factors[name] = factor / self._size(found) + left / self._count(found) ** 0.5
        ahead, behind = landscape.evaluate([(direction, landscape.eps), (direction, -landscape.eps)])
        slope = (ahead - behind).mean() / (2 * landscape.eps)
        if self.how == "guided covariance":
            estimate.add(direction, slope)
        else:
            expected = sum(float((factor * direction.factors[name]).sum()) for name, factor in found.factors.items())
            shrink = 1 / self._count(found) if self.how == "control variate, shrunk" else 1.0
            estimate.add(direction, (slope - expected) * shrink)
            for name, factor in found.factors.items():
                add_to(estimate.factors, name, factor)
        return loss, []

    def _count(self, found: Estimate) -> int:
        return sum(factor.numel() for factor in found.factors.values())

    def _size(self, found: Estimate) -> float:
        return sum(float(factor.square().sum()) for factor in found.factors.values()) ** 0.5

    def __str__(self) -> str:
        return self.how


def corrected(model: Any, how: str) -> zoft.ZeroOrder:
    """An optimizer whose estimates are to be compared."""
    subspace = Activation(8, renew_every=1, read_only=True)
    return zoft.ZeroOrder(
        model, lr=0.0, eps=EPS, subspace=subspace, estimator=Corrected(how), update=SGD(), exclude=HEADS
    )


def cosines(rows: list[Any], task: Any) -> dict[str, Any]:
    """What `align` finds of the guided estimate, and of its corrections."""
    model, tokenizer = load_model("demo", dtype="float32")
    closures = task_closures(model, task_batches(model, tokenizer, task, rows[: HELD * BATCH], BATCH))
    makers = {"guided": partial(zoft.Guided, renew_every=1, into="weights")}
    for how in ("control variate", "control variate, shrunk", "guided covariance"):
        makers[how] = partial(corrected, how=how)
    found = align(model, closures, makers, HELD)
    return {name: alignment.summary()["cosine_mean"] for name, alignment in found.items()}


@torch.no_grad()
def training(rows: list[Any], held: list[Any], task: Any, searched: bool) -> dict[str, Any]:
    """The loss on held-out rows after training with FORWARDS forwards."""
    model, tokenizer = load_model("demo")
    batches = task_closures(model, task_batches(model, tokenizer, task, rows, BATCH))
    test = task_closures(model, task_batches(model, tokenizer, task, held, BATCH))
    optimizer = zoft.Guided(model, lr=1e-3)
    steps = FORWARDS // (1 + len(TRIED)) if searched else FORWARDS
    schedule, chosen = LinearLR(optimizer, 1.0, 0.0, total_iters=steps), []
    for closure in batches[:steps]:
        optimizer.estimate(closure)
        if searched:
            chosen.append(_best_rate(optimizer, closure))
        else:
            optimizer.step()
        schedule.step()
    loss = sum(float(closure().values.mean()) for closure in test) / len(test)
    return {"steps": steps, "held_out_loss": loss, "chosen": [chosen.count(scale) for scale in TRIED]}


def _best_rate(optimizer: zoft.ZeroOrder, closure: Any) -> float:
    """Take the step of those tried that leaves the lowest loss on the batch."""
    (group,) = optimizer.param_groups
    rate, before = group["lr"], {name: factor.clone() for name, factor in optimizer.coefficients.items()}
    group["lr"] = 1.0
    optimizer.step()  # Adam's move at rate 1: the others are multiples of it
    moves = {name: factor - before[name] for name, factor in optimizer.coefficients.items()}
    group["lr"] = rate

    def go(scale: float) -> None:
        for name, factor in optimizer.coefficients.items():
            factor.copy_(before[name] + rate * scale * moves[name])

    def loss(scale: float) -> float:
        go(scale)
        return float(closure().values.mean())

    best = min(TRIED, key=loss)
    go(best)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    args = parser.parse_args()
    task = load_task("sst2")
    drawn = sample(load_rows(task, args.data, "train"), (FORWARDS + 25) * BATCH, 0)
    rows, held = drawn[: FORWARDS * BATCH], drawn[FORWARDS * BATCH :]
    found = {"cosines": cosines(rows, task)}
    print(found, flush=True)
    found |= {name: training(rows, held, task, name == "line search") for name in ("plain", "line search")}
    print(found, flush=True)
    write_json(Path(__file__).parent / "results" / "corrections.json", {"model": "demo", "forwards": FORWARDS} | found)


if __name__ == "__main__":
    main()
