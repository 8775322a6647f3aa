"""Cosine of each method's estimate with the true gradient of all linear layers: predicted beside measured.

    python benchmarks/cosines.py start --data DATA
    python benchmarks/cosines.py start --data DATA --model gemma-3-270m.gguf --name gemma3-270m
    python benchmarks/cosines.py course --data DATA

Models in float32, three batches. `start` takes an untrained model on SST-2, RTE and TREC (batches of 16 as in the suite
) and on running text (WikiText-2, batches of 8 x 64 tokens, every one of them predicted). `course` follows SST-2
over 200 guided steps, written into the weights: at the start and after 50, 100 and 200 of them every method is compared
with the gradient of the same batches. Writes results/cosines_NAME.json, and for `course` cosines_course.json and .png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.optim.lr_scheduler import LinearLR

import zoft
from zoft.bench import align
from zoft.data import load_rows, load_task, sample
from zoft.optim import METHODS, Loss
from zoft.train import load_model, task_batches, task_closures
from zoft.train.files import write_json

RESULTS = Path(__file__).parent / "results"
TASKS, TEXT = ("sst2", "rte", "trec"), "wikitext2"
POINTS = (0, 50, 100, 200)
BATCH, TEXTS, LENGTH, HELD = 16, 8, 64, 3
PROBED = ("agzo", "zo-act", "lozo", "mezo")
EPS = 3e-3
AS_STEPPED = {"renew_every": 1, "into": "weights"}  # the basis of the batch that it is compared on

Closures = list[Callable[[], Loss]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "course"))
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder of rows for each task")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--name", default="demo", help="of the model, in the result")
    parser.add_argument("--estimates", type=int, default=9, help="of each method with probes")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype="float32")
    if args.what == "course":
        course(model, tokenizer, args.data, args.estimates)
        return
    found = {}
    for name in (*TASKS, TEXT):
        folder = args.data / name
        text = name == TEXT
        closures = of_text(model, tokenizer, folder) if text else of_task(model, tokenizer, name, folder, HELD)
        found[name] = compare(model, closures, args.estimates)
        print(name, {method: f"{facts['cosine_mean']:.5f}" for method, facts in found[name].items()}, flush=True)
        facts = {"model": args.name, "estimates": args.estimates, "data": found}
        write_json(RESULTS / f"cosines_{args.name}.json", facts)


def of_task(model: Any, tokenizer: Any, name: str, folder: Path, batches: int) -> Closures:
    """Losses of training batches."""
    task = load_task(name)
    rows = sample(load_rows(task, folder, "train"), batches * BATCH, 0)
    return task_closures(model, task_batches(model, tokenizer, task, rows, BATCH))


def of_text(model: Any, tokenizer: Any, folder: Path) -> Closures:
    """Losses of running text, from its beginning."""
    text = (folder / "test.txt").read_text(encoding="utf-8")[:200_000]
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, : HELD * TEXTS * LENGTH]
    batches = tokens.view(HELD, TEXTS, LENGTH).to(model.device)
    return [lambda ids=ids: zoft.cross_entropy(model(ids, use_cache=False).logits, ids) for ids in batches]


def compare(model: Any, closures: Closures, estimates: int) -> dict[str, Any]:
    """What `align` finds of every method, the guided one first."""
    guided = {"guided": partial(METHODS["guided"], lr=0.0, **AS_STEPPED)}
    probed = {name: partial(METHODS[name], lr=0.0, eps=EPS) for name in PROBED}
    found = align(model, closures, guided, len(closures)) | align(model, closures, probed, estimates)
    return {name: alignment.summary() for name, alignment in found.items()}


def course(model: Any, tokenizer: Any, data: Path, estimates: int) -> None:
    """Every method along one course of training."""
    steps = POINTS[-1]
    closures = of_task(model, tokenizer, "sst2", data / "sst2", HELD + steps)
    held, batches = closures[:HELD], closures[HELD:]
    optimizer = zoft.Guided(model, lr=1e-3, into="weights")
    schedule = LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    points: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step in POINTS:
            points.append({"step": step, "methods": compare(model, held, estimates)})
            print(step, {n: f"{f['cosine_mean']:.5f}" for n, f in points[-1]["methods"].items()}, flush=True)
        if step < steps:
            optimizer.step(batches[step])
            schedule.step()
    write_json(RESULTS / "cosines_course.json", {"model": "demo", "task": "sst2", "points": points})
    plot(points)


def plot(points: list[dict[str, Any]]) -> None:
    """Measured cosines with their standard errors, predictions dashed."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log", nonpositive="clip")
    steps = [point["step"] for point in points]
    for number, name in enumerate(points[0]["methods"]):
        facts = [point["methods"][name] for point in points]
        colour, means = f"C{number}", [fact["cosine_mean"] for fact in facts]
        axes.errorbar(steps, means, [fact["cosine_sem"] for fact in facts], marker="o", color=colour, label=name)
        axes.plot(steps, [fact["predicted_cosine"] for fact in facts], "--", color=colour)
    axes.set_xlabel("steps of training")
    axes.set_ylabel("cosine to the true gradient")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left", ncols=5, frameon=False)
    figure.savefig(RESULTS / "cosines_course.png", dpi=160)


if __name__ == "__main__":
    main()
