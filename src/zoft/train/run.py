"""`zoft train`: from a configuration to a run folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, set_seed

from zoft import __version__
from zoft.data import Encoder, Task, TaskDataset, hold_out, load_rows, sample
from zoft.errors import UserError
from zoft.report import write_report
from zoft.train.callbacks import LiveProgress, RunLog
from zoft.train.config import TrainConfig
from zoft.train.memory import peak_memory_bytes
from zoft.train.models import load_model, max_length
from zoft.train.optimizers import FIRST_ORDER, build
from zoft.train.task_trainer import TaskTrainer

EXAMPLES_SHOWN = 6
FIRST_ORDER_STEP = 3  # forwards that a forward and a backward cost


def train(config: TrainConfig, console: Console, *, resume: bool = False) -> dict[str, Any]:
    """Run `config`, or continue it, leave a run folder in ``config.out``, and return its summary.

    The metric is measured on the validation split before and after training. In between, rows held out of the
    training rows ("dev") choose the checkpoint to keep: ``best`` is that model's metric on the validation split,
    ``final`` the last model's. The model kept is in ``model/``, or in ``adapter/`` if it is a PEFT adapter.

    Raises:
        UserError: anything the user can mend.
    """
    task, out = config.load_task(), Path(config.out)
    if not resume and (out / "config.yaml").exists():
        raise UserError(f"{out} holds a run already: choose another --out, or continue it with --resume {out}")
    console.print(f"loading {config.model}")
    # First-order references keep float32 weights and compute in bfloat16, as is usual: small steps would vanish.
    dtype = "float32" if config.method in FIRST_ORDER else config.dtype
    model, tokenizer = load_model(config.model, dtype=dtype, device=config.device)
    data = load_data(config, task, Encoder(tokenizer, task, room(config, task, model)))
    set_seed(config.seed)
    model, optimizer = build(config, model)

    def forwards(step: int) -> int:
        zero_order = trainer.zero_order
        return zero_order.counters.forwards if zero_order else step * config.accumulate * FIRST_ORDER_STEP

    log = RunLog(out / "metrics.jsonl", forwards)
    trainer = TaskTrainer(
        model,
        tokenizer,
        task,
        _arguments(config, task),
        train_dataset=data["train"],
        eval_dataset=data["dev"],
        optimizers=(optimizer, None),
        callbacks=[log, LiveProgress(console, task.metric, log)],
    )
    trainer.remove_callback(PrinterCallback)

    def validate() -> dict[str, Any]:
        found = trainer.evaluate(data["validation"], metric_key_prefix="validation")
        return {"metric": found[f"validation_{task.metric}"], "texts": _texts(trainer, data["validation"])}

    checkpoint = get_last_checkpoint(str(out)) if resume else None
    if checkpoint is None:
        out.mkdir(parents=True, exist_ok=True)
        config.save(out / "config.yaml")
        log.path.unlink(missing_ok=True)
        write_json(out / "initial.json", validate())
        trainer.evaluate()
    initial = json.loads((out / "initial.json").read_text(encoding="utf-8"))
    console.print(f"{task.title}: {task.metric} {initial['metric']:.3f} before training")

    trainer.train(resume_from_checkpoint=checkpoint)

    final = best = validate()
    if trainer.state.best_global_step not in (None, trainer.state.global_step):
        trainer._load_best_model()
        best = validate()
    _save_result(trainer, out)
    steps, counters = trainer.state.global_step, trainer.zero_order and trainer.zero_order.counters
    summary = {
        "task": task.name,
        "model": config.model,
        "method": config.method,
        "seed": config.seed,
        "steps": steps,
        "forwards": forwards(steps),
        "examples_seen": steps * config.batch_size * config.accumulate,
        "metric": task.metric,
        "initial": initial["metric"],
        "final": final["metric"],
        "best": best["metric"],
        "best_step": trainer.state.best_global_step,
        "best_dev": trainer.state.best_metric,
        "seconds": round(log.seconds, 3),
        "seconds_per_step": round(log.seconds / steps, 4),
        "peak_memory_bytes": peak_memory_bytes(),
        "skipped": counters.skipped if counters else 0,
        "zero": counters.zero if counters else 0,
        **{f"{split}_examples": len(dataset) for split, dataset in data.items()},
        "truncated": sum(dataset.truncated for dataset in data.values()),
        "zoft_version": __version__,
    }
    write_json(out / "summary.json", summary)
    write_json(out / "examples.json", _examples(task, data["validation"], initial["texts"], best["texts"]))
    write_report(out)
    if config.save_steps is None:
        for folder in out.glob("checkpoint-*"):
            shutil.rmtree(folder)
    return summary


def load_data(config: TrainConfig, task: Task, encoder: Encoder) -> dict[str, TaskDataset]:
    """The splits ``train``, ``dev`` (rows held out of train, at most a fifth of them) and ``validation``, encoded.

    Of the training rows as many are drawn as the run can see; every draw depends on the seed alone.
    """
    rows = load_rows(task, config.data, "train")
    rest, dev = hold_out(rows, min(config.dev_examples, max(1, len(rows) // 5)), config.seed)
    seen = config.steps * config.batch_size * config.accumulate
    validation = load_rows(task, config.data, "validation")
    chosen = {
        "train": sample(rest, config.train_examples or seen, config.seed),
        "dev": dev,
        "validation": sample(validation, config.eval_examples or len(validation), 0),
    }
    return {split: TaskDataset(some, encoder) for split, some in chosen.items()}


def room(config: TrainConfig, task: Task, model: PreTrainedModel) -> int:
    """Tokens that an encoded example may have, so that what is generated still fits the model."""
    return config.max_length or max_length(model) - task.max_new_tokens


def write_json(path: Path, value: Any) -> None:
    """Write `value` aside and rename it into place."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _arguments(config: TrainConfig, task: Task) -> TrainingArguments:
    return TrainingArguments(
        output_dir=config.out,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.accumulate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        max_grad_norm=0.0,  # gradients are neither computed nor, for the references, clipped
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps" if config.save_steps else "best",
        save_steps=config.save_steps or config.eval_steps,
        save_total_limit=1,
        metric_for_best_model=f"eval_{task.metric}",
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
        bf16=config.method in FIRST_ORDER and config.dtype in ("auto", "bfloat16"),
        use_cpu=config.device == "cpu",
    )


def _save_result(trainer: TaskTrainer, out: Path) -> None:
    """Save the trained model or adapter under its final name only once it is complete."""
    aside = out / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    trainer.save_model(str(aside))
    target = out / ("adapter" if (aside / "adapter_config.json").is_file() else "model")
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def _texts(trainer: TaskTrainer, dataset: TaskDataset) -> list[str]:
    """What was predicted for the first rows, as text."""
    rows = dataset.rows[:EXAMPLES_SHOWN]
    return [
        str(found) if isinstance(found := trainer.predictions[i], str) else trainer.task.choices(row)[found]
        for i, row in enumerate(rows)
    ]


def _examples(task: Task, dataset: TaskDataset, before: list[str], after: list[str]) -> list[dict[str, str]]:
    rows = dataset.rows[:EXAMPLES_SHOWN]
    answers = [task.choices(row)[task.golds(row)[0]] for row in rows]
    return [
        {"prompt": task.show(row), "answer": answer, "before": old, "after": new}
        for row, answer, old, new in zip(rows, answers, before, after, strict=True)
    ]
