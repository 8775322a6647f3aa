"""Is it worth carrying guided's error through attention? Cosines, and training on running text.

    python benchmarks/attention.py cosine --data DATA
    python benchmarks/attention.py text --data DATA
    python benchmarks/attention.py energy --data DATA

SmolLM2-135M-Instruct. Cosines with the true gradient of all linear layers in float32, three batches of each of SST-2,
RTE, TREC and WikiText-2, as benchmarks/cosines.py has them. Or 60 steps on WikiText-2's test text (batches of 8 x 64
tokens, every one of them predicted; bfloat16, lr 1e-3 falling linearly), and the loss on 12 such batches of its
validation text after every 15, with three orders of the batches. Or what leaving tokens with little error out does to
the estimate: the cosine with that of all tokens, and the CPU time of a step in plain forwards of the batch, with bases
trained, on a batch that two others have been learned from before. Writes results/attention/cosine.json, text.json or
energy.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cosines import AS_STEPPED, BATCH, HELD, RESULTS, TASKS, TEXT, of_task, of_text
from torch.optim.lr_scheduler import LinearLR

import zoft
from zoft.bench import align
from zoft.optim import METHODS
from zoft.train import load_model
from zoft.train.arithmetic import settle_arithmetic
from zoft.train.files import write_json

STEPS, EVERY, TEXTS, LENGTH, HELD_TEXTS, ORDERS = 60, 15, 8, 64, 12, 3
VARIANTS = {"without": False, "with": True}
ENERGIES, ROUNDS = (1.0, 0.999, 0.99, 0.95, 0.9), 3
FILES = (("test", STEPS), ("validation", HELD_TEXTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cosine", "text", "energy"])
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder of rows for each task")
    given = parser.parse_args()
    measure = {"cosine": cosines, "text": texts, "energy": energies}[given.what]
    write_json(RESULTS / "attention" / f"{given.what}.json", {"batch": BATCH, given.what: measure(given.data)})


def texts(data: Path) -> dict[str, list[list[float]]]:
    """The losses of each variant, by the order of the batches."""
    found: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for order in range(ORDERS):
        for name, attention in VARIANTS.items():
            found[name].append(trained(data / TEXT, attention, order))
            print(order, name, found[name][-1], flush=True)
    return found


def cosines(data: Path) -> dict[str, Any]:
    """The mean over the batches of each task."""
    model, tokenizer = load_model("demo", dtype="float32")
    methods = {
        name: partial(METHODS["guided"], lr=0.0, attention=attention, energy=1.0, **AS_STEPPED)
        for name, attention in VARIANTS.items()
    }
    found = {}
    for task in (*TASKS, TEXT):
        closures = batches_of(model, tokenizer, task, data)
        alignments = align(model, closures, methods, len(closures))
        found[task] = {name: alignment.summary()["cosine_mean"] for name, alignment in alignments.items()}
        print(task, found[task], flush=True)
    return found


def energies(data: Path) -> dict[str, Any]:
    """By task and energy: the cosines of what is found for coefficients and for bases, and the CPU time of a step."""
    found: dict[str, Any] = {}
    for task in (*TASKS, TEXT):
        model, tokenizer = load_model("demo")
        settle_arithmetic(model, "auto")
        first, second, held = batches_of(model, tokenizer, task, data)
        optimizer = zoft.Guided(model, attention=True, train_bases=True)
        for closure in (first, second):
            optimizer.step(closure)
        estimates: dict[float, list[torch.Tensor]] = {}
        plain, seconds = [], {energy: [] for energy in ENERGIES}
        for _ in range(ROUNDS):
            plain.append(cpu_seconds(torch.inference_mode()(held)))
            for energy in ENERGIES:
                optimizer.estimator.energy = energy
                seconds[energy].append(cpu_seconds(partial(optimizer.estimate, held)))
                estimate = optimizer.take_estimate()
                assert estimate is not None
                parts = (estimate.factors, estimate.bases)
                estimates[energy] = [torch.cat([part[name].flatten() for name in sorted(part)]) for part in parts]
        found[task] = {
            str(energy): {
                "cosines": [cosine(*pair) for pair in zip(estimates[energy], estimates[1.0], strict=True)],
                "forwards": median(seconds[energy]) / median(plain),
            }
            for energy in ENERGIES
        }
        print(task, found[task], flush=True)
    return found


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one.double(), other.double(), dim=0))


def cpu_seconds(call: Callable[[], Any]) -> float:
    before = time.process_time()
    call()
    return time.process_time() - before


def batches_of(model: Any, tokenizer: Any, task: str, data: Path) -> Any:
    if task == TEXT:
        return of_text(model, tokenizer, data / task)
    return of_task(model, tokenizer, task, data / task, HELD)


def trained(folder: Path, attention: bool, order: int) -> list[float]:
    """The loss on held-out text after every `EVERY` steps, from the untrained model's on."""
    model, tokenizer = load_model("demo", dtype="bfloat16")
    batches, held = (texts_of(tokenizer, folder / f"{name}.txt", count) for name, count in FILES)
    shuffled = torch.randperm(STEPS, generator=torch.Generator().manual_seed(order))

    def loss(tokens: torch.Tensor) -> zoft.Loss:
        return zoft.cross_entropy(model(tokens, use_cache=False).logits, tokens)

    @torch.no_grad()
    def held_loss() -> float:
        return sum(float(loss(tokens).values) for tokens in held) / len(held)

    optimizer = zoft.Guided(model, attention=attention)
    schedule = LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    found = [held_loss()]
    for step, number in enumerate(shuffled.tolist(), start=1):
        optimizer.step(partial(loss, batches[number]))
        schedule.step()
        if step % EVERY == 0:
            found.append(held_loss())
    return found


def texts_of(tokenizer: Any, path: Path, count: int) -> torch.Tensor:
    """int64 [count, TEXTS, LENGTH] from the file's beginning."""
    text = path.read_text(encoding="utf-8")[: count * TEXTS * LENGTH * 8]
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, : count * TEXTS * LENGTH]
    return tokens.view(count, TEXTS, LENGTH)


if __name__ == "__main__":
    main()
