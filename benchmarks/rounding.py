"""What half-precision weights keep of their updates: stochastic rounding beside a plain write.

    python benchmarks/rounding.py --data DATA/sst2

500 AGZO steps on SmolLM2-135M-Instruct in bfloat16 (SST-2, batches of 16, lr 1e-4). Beside the weights, which are
written with stochastic rounding, a copy takes the same updates by a plain in-place addition, which rounds to the
nearest, another in sums of 16 (`fold_every`), rounded stochastically, and a float32 sum takes them exactly. Of each
kind of write: the share of the intended update that the weights have moved, ``<moved, intended> / |intended|^2``, over
all linear layers, and the size of what else they have moved, over the intended update's. Writes results/rounding.json.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import zoft
from zoft.data import load_rows, load_task, sample
from zoft.optim.pending import Pending
from zoft.optim.write import add_low_rank_
from zoft.train import load_model, task_batches, task_closures
from zoft.train.files import write_json

STEPS, BATCH, LR, EVERY, FOLD_EVERY = 500, 16, 1e-4, 50, 16


def compare(start: dict[str, Tensor], now: dict[str, Tensor], intended: dict[str, Tensor]) -> dict[str, float]:
    """The share of `intended` that the weights have moved from `start` to `now`, and the rest's relative size."""
    along = size = whole = 0.0
    for name, exact in intended.items():
        moved = now[name].float() - start[name].float()
        along += float((moved * exact).sum())
        size += float(exact.square().sum())
        whole += float(moved.square().sum())
    share = along / size
    return {"share": share, "rest": max(0.0, whole / size - share**2) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    model, tokenizer = load_model("demo")
    task = load_task("sst2")
    rows = sample(load_rows(task, arguments.data, "train"), BATCH * arguments.steps, 0)
    closures = task_closures(model, task_batches(model, tokenizer, task, rows, BATCH))
    optimizer = zoft.AGZO(model, lr=LR)
    weights = {m.name: m.weight.data for m in optimizer.maps if m.weight is not None}
    start = {name: weight.clone() for name, weight in weights.items()}
    plain = {name: weight.clone() for name, weight in weights.items()}
    folded = {name: weight.clone() for name, weight in weights.items()}
    folded_maps, pending = [replace(m, weight=folded[m.name]) for m in optimizer.maps], Pending()
    intended = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    course = []
    for step, closure in enumerate(closures, start=1):
        optimizer.estimate(closure)
        estimate = optimizer.take_estimate()
        assert estimate is not None
        for name, factor in estimate.factors.items():
            left, basis = -LR * factor, optimizer.bases[name]
            add_low_rank_(weights[name], left, basis, (0, step, name))
            plain[name] += (left @ basis.t()).to(plain[name].dtype)
            pending.add(name, left, basis, 1.0)
            intended[name].addmm_(left, basis.t())
        pending.end_step()
        if pending.steps == FOLD_EVERY or step % EVERY == 0:
            pending.write(folded_maps, (0, step))
        if step % EVERY == 0:
            course.append(
                {
                    "step": step,
                    "stochastic": compare(start, weights, intended),
                    "nearest": compare(start, plain, intended),
                    "folded": compare(start, folded, intended),
                }
            )
            print(course[-1], flush=True)
    facts = {"model": "demo", "task": "sst2", "batch_size": BATCH, "lr": LR, "steps": arguments.steps, "course": course}
    write_json(Path(__file__).parent / "results" / "rounding.json", facts)


if __name__ == "__main__":
    main()
