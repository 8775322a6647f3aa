"""`zoft eval`: the evaluation that training uses, on its own."""

from __future__ import annotations

import tempfile
from typing import Any

from zoft.data import Encoder, TaskDataset, load_rows, sample
from zoft.train.adapter import beside, peft_runs, take_apart
from zoft.train.arguments import training_arguments
from zoft.train.arithmetic import settle_arithmetic
from zoft.train.config import TrainConfig
from zoft.train.memory import peak_memory_bytes
from zoft.train.models import load_model, room
from zoft.train.task_trainer import TaskTrainer


def evaluate(config: TrainConfig, shots: int = 0) -> dict[str, Any]:
    """The task's metrics of ``config.model`` on the validation rows, after `shots` training rows in the prompt.

    Raises:
        UserError: anything the user can mend.
    """
    task = config.load_task(learned=shots > 0)
    shown = sample(load_rows(task, config.data, "train"), shots, config.seed) if shots else []
    rows = load_rows(task, config.data, "validation")
    rows = sample(rows, config.eval_examples or len(rows), 0)
    model: Any
    model, tokenizer = load_model(config.model, **config.loading)
    settle_arithmetic(model, config.compute_dtype)
    if not peft_runs(model):
        model = beside(*take_apart(model))
    encoder = Encoder(tokenizer, task, room(model, task, config.max_length), shown)
    dataset, task = TaskDataset(rows, encoder), encoder.task
    with tempfile.TemporaryDirectory() as folder:
        trainer = TaskTrainer(model, tokenizer, task, training_arguments(config, task, folder), eval_dataset=dataset)
        found = trainer.evaluate()
    result: dict[str, Any] = {"task": task.name, "model": config.model, "shots": shots, "metric": task.metric}
    result |= {name: found[f"eval_{name}"] for name in (task.metric, *task.also, "loss") if f"eval_{name}" in found}
    return result | {
        "examples": len(rows),
        "truncated": dataset.truncated,
        "seconds": found["eval_runtime"],
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
    }
