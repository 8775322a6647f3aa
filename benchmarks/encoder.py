"""An encoder with a new head learns to classify: guided, probes and AdamW with as many steps.

    python benchmarks/encoder.py WAY --task sst2 --data DATA --lr LR --seed SEED [--rank RANK] [--model MODEL]

`MODEL` is a folder or a name of the hub; the figures are of sentence-transformers/all-MiniLM-L6-v2, of BERT's kind with
six layers, in float32, and a head with random weights. 200 steps of batch 16, the rate falling linearly to 0; accuracy
on 400 rows held out of the training split and on the validation rows, before and after every 50 steps. Writes
results/encoder/TASK-WAY-lrLR-sSEED.json, the rank in the name too if it is not guided's own, 8.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainingArguments,
    set_seed,
)

import zoft
from zoft.train.files import write_json
from zoft.train.memory import peak_memory_bytes

RESULTS = Path(__file__).parent / "results" / "encoder"
STEPS, EVERY, BATCH, HELD_OUT, EPS = 200, 50, 16, 400, 3e-3
# The text, the label and how many there are; the files of both splits.
TASKS: dict[str, tuple[str, str, int, tuple[str, str]]] = {
    "sst2": ("sentence", "label", 2, ("train", "validation")),
    "trec": ("text", "coarse_label", 6, ("train", "test")),
}
WAYS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "guided": zoft.Guided,
    "guided-attention": partial(zoft.Guided, attention=True),
    "agzo": partial(zoft.AGZO, eps=EPS),
    "zo-act": partial(zoft.ZOAct, eps=EPS),
    "mezo": partial(zoft.MeZO, eps=EPS),
    "fo-adamw": lambda model, lr, seed: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0),
}


def read(task: str, folder: Path, tokenizer: Any) -> list[list[dict[str, Any]]]:
    """The rows of both splits, encoded."""
    text, label, _, splits = TASKS[task]
    lines = [map(json.loads, (folder / task / f"{split}.jsonl").read_text().splitlines()) for split in splits]
    return [[{**tokenizer(row[text], truncation=True), "labels": row[label]} for row in rows] for rows in lines]


def accuracy(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with the folders of the tasks")
    parser.add_argument("--lr", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, help="of guided's bases")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    given = parser.parse_args()
    way, task, lr, seed = given.way, given.task, given.lr, given.seed
    options = {} if given.rank is None else {"rank": given.rank}
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=TASKS[task][2])
    train, validation = read(task, given.data, tokenizer)
    random.Random(0).shuffle(train)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            lr_scheduler_type="linear",
            eval_strategy="steps",
            eval_steps=EVERY,
            eval_on_start=True,
            logging_steps=EVERY,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=seed,
        )
        trainer = zoft.ZOTrainer(
            model,
            arguments,
            train_dataset=train[HELD_OUT:],
            eval_dataset={"held_out": train[:HELD_OUT], "validation": validation},
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
            optimizers=(WAYS[way](model, lr=float(lr), seed=seed, **options), None),
        )
        trainer.train()
    found: dict[int, dict[str, float]] = {}
    for line in trainer.state.log_history:
        for rows in ("held_out", "validation"):
            if f"eval_{rows}_accuracy" in line:
                found.setdefault(line["step"], {})[rows] = line[f"eval_{rows}_accuracy"]
    rank, ranked = ("", "") if given.rank is None else (f" --rank {given.rank}", f"-rank{given.rank}")
    command = f"python benchmarks/encoder.py {way} --task {task} --data DATA --lr {lr} --seed {seed}{rank}"
    facts = {"command": command, "accuracy": found, "peak_memory_bytes": peak_memory_bytes()}
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{task}-{way}{ranked}-lr{lr}-s{seed}.json", facts)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
