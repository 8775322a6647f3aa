"""Cosine of each method's estimate with the true gradient, over training: predicted beside measured.

    python benchmarks/cosines.py --data DATA/sst2

SmolLM2-135M-Instruct in float32, SST-2, batches of 16, one course of training for all: guided steps, written into the
weights. At the start and after 50, 100 and 200 of them every method is compared with the gradient of the same three
batches. Writes results/cosines_sst2.json and results/cosines_sst2.png.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.optim.lr_scheduler import LinearLR

import zoft
from zoft.bench import align
from zoft.data import load_rows, load_task, sample
from zoft.optim import METHODS
from zoft.train import load_model, task_batches, task_closures
from zoft.train.files import write_json

RESULT = Path(__file__).parent / "results" / "cosines_sst2.json"
POINTS = (0, 50, 100, 200)
BATCH = 16
EPS = {"agzo": 3e-3, "zo-act": 3e-3, "lozo": 3e-3, "mezo": 3e-3}
AS_STEPPED = {"renew_every": 1, "into": "weights"}  # the basis of the batch that it is compared on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--estimates", type=int, default=15)
    args = parser.parse_args()
    task = load_task("sst2")
    model, tokenizer = load_model("demo", dtype="float32")
    steps = POINTS[-1]
    rows = sample(load_rows(task, args.data, "train"), (steps + 3) * BATCH, 0)
    closures = task_closures(model, task_batches(model, tokenizer, task, rows, BATCH))
    held, batches = closures[:3], closures[3:]
    optimizer = zoft.Guided(model, lr=1e-3, into="weights")
    schedule = LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    probed = {name: partial(METHODS[name], lr=0.0, eps=eps) for name, eps in EPS.items()}
    guided = {"guided": partial(METHODS["guided"], lr=0.0, **AS_STEPPED)}
    course: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step in POINTS:
            found = align(model, held, probed, args.estimates) | align(model, held, guided, len(held))
            facts = {name: alignment.summary() for name, alignment in found.items()}
            course.append({"step": step, "methods": facts})
            print(step, {name: f"{fact['cosine_mean']:.5f}" for name, fact in facts.items()}, flush=True)
        if step < steps:
            optimizer.step(batches[step])
            schedule.step()
    write_json(RESULT, {"model": "demo", "task": "sst2", "estimates": args.estimates, "course": course})
    plot(course)


def plot(course: list[dict[str, Any]]) -> None:
    """Measured cosines with their standard errors, predictions dashed."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log", nonpositive="clip")
    steps = [point["step"] for point in course]
    for number, name in enumerate(course[0]["methods"]):
        facts = [point["methods"][name] for point in course]
        colour, means = f"C{number}", [fact["cosine_mean"] for fact in facts]
        axes.errorbar(steps, means, [fact["cosine_sem"] for fact in facts], marker="o", color=colour, label=name)
        axes.plot(steps, [fact["predicted_cosine"] for fact in facts], "--", color=colour)
    axes.set_xlabel("steps of training")
    axes.set_ylabel("cosine to the true gradient")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left", ncols=5, frameon=False)
    figure.savefig(RESULT.with_suffix(".png"), dpi=160)


if __name__ == "__main__":
    main()
