"""Is it worth carrying guided's error through attention? Cosines, and training on running text.

    python benchmarks/attention.py cosine --data DATA
    python benchmarks/attention.py text --data DATA

SmolLM2-135M-Instruct. Cosines with the true gradient of all linear layers in float32, three batches of each of SST-2,
RTE, TREC and WikiText-2, as benchmarks/cosines.py has them. Or 60 steps on WikiText-2's test text (batches of 8 x 64
tokens, every one of them predicted; bfloat16, lr 1e-3 falling linearly), and the loss on 12 such batches of its
validation text after every 15, with three orders of the batches. Writes results/attention/cosine.json or text.json.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cosines import AS_STEPPED, BATCH, HELD, RESULTS, TASKS, TEXT, of_task, of_text
from torch.optim.lr_scheduler import LinearLR

import zoft
from zoft.bench import align
from zoft.optim import METHODS
from zoft.train import load_model
from zoft.train.files import write_json

STEPS, EVERY, TEXTS, LENGTH, HELD_TEXTS, ORDERS = 60, 15, 8, 64, 12, 3
VARIANTS = {"without": False, "with": True}
FILES = (("test", STEPS), ("validation", HELD_TEXTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cosine", "text"])
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder of rows for each task")
    given = parser.parse_args()
    measure = cosines if given.what == "cosine" else texts
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
        name: partial(METHODS["guided"], lr=0.0, attention=attention, **AS_STEPPED)
        for name, attention in VARIANTS.items()
    }
    found = {}
    for task in (*TASKS, TEXT):
        text = task == TEXT
        closures = (
            of_text(model, tokenizer, data / task) if text else of_task(model, tokenizer, task, data / task, HELD)
        )
        alignments = align(model, closures, methods, len(closures))
        found[task] = {name: alignment.summary()["cosine_mean"] for name, alignment in alignments.items()}
        print(task, found[task], flush=True)
    return found


def trained(folder: Path, attention: bool, order: int) -> list[float]:
    """The loss on held-out text after every `EVERY` steps, from the untrained model's on."""
    model, tokenizer = load_model("demo", dtype="bfloat16")
    batches, held = (batches_of(tokenizer, folder / f"{name}.txt", count) for name, count in FILES)
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


def batches_of(tokenizer: Any, path: Path, count: int) -> torch.Tensor:
    """int64 [count, TEXTS, LENGTH] from the file's beginning."""
    text = path.read_text(encoding="utf-8")[: count * TEXTS * LENGTH * 8]
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, : count * TEXTS * LENGTH]
    return tokens.view(count, TEXTS, LENGTH)


if __name__ == "__main__":
    main()
