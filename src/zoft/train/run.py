"""`zoft train`: from a configuration to a run folder."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers.trainer_utils import set_seed

from zoft import __version__
from zoft.data import Encoder, Row, Task, TaskDataset, hold_out, load_rows, sample
from zoft.errors import UserError
from zoft.optim import EstimateWarning, NoStream, ZeroOrder
from zoft.optim.landscape import Closure
from zoft.optim.ranks import Ranks
from zoft.report import write_report
from zoft.train.adapter import Factors, start_from, take_apart
from zoft.train.arguments import training_arguments
from zoft.train.auto import BATCHES, settle
from zoft.train.batches import task_batches, task_closures
from zoft.train.callbacks import Clock, LiveProgress, RunLog, StepLog
from zoft.train.checkpoints import last_checkpoint, remove, whole_folder
from zoft.train.config import COEFFICIENTS, TrainConfig
from zoft.train.files import read_json, write_json
from zoft.train.guard import INITIAL
from zoft.train.identity import identity, model_digest
from zoft.train.memory import peak_memory_bytes
from zoft.train.models import find_device, load_model, room
from zoft.train.optimizers import AUTO, build
from zoft.train.processes import agreed, held, join, one_after_the_first, require_agreed, wait
from zoft.train.stop import Stop
from zoft.train.task_trainer import TaskTrainer
from zoft.train.watch import Watch

EXAMPLES_SHOWN = 6
FIRST_ORDER_STEP = 3  # forwards that a forward and a backward cost


def train(config: TrainConfig, console: Console, *, resume: bool = False) -> dict[str, Any]:
    """Run `config`, or continue it, leave a run folder in ``config.out``, and return its summary.

    The metric is measured on the validation split before and after training. In between, rows held out of the
    training rows ("dev") choose the checkpoint to keep: ``best`` is that model's metric on the validation split,
    ``final`` the last model's. The model kept is in ``model/``, or in ``adapter/`` if it is a PEFT adapter. What
    `config` leaves to zoft stands settled in ``config.yaml``, and what was measured for it in ``diagnosis.json``.

    Raises:
        UserError: anything the user can mend.
    """
    first = join(find_device(config.device))
    console.quiet = console.quiet or not first
    config = replace(config, out=agreed(config.out))  # each may have found another free folder
    with held(Path(config.out)):
        return _train(config, console, resume, first)


def _train(config: TrainConfig, console: Console, resume: bool, first: bool) -> dict[str, Any]:
    task, out = config.load_task(), Path(config.out)
    config.check_objective(task)
    if config.first_order and Ranks().count > 1:
        raise UserError(f"{config.method} is a reference and runs in one process: start it without torchrun")
    if not resume and (out / "config.yaml").exists():
        raise UserError(f"{out} holds a run already: choose another --out, or continue it with --resume {out}")
    training_rows = load_rows(task, config.data, "train")
    rows = split(config, task, training_rows)
    console.print(f"loading {config.model}")
    model: Any
    with one_after_the_first():  # which may have to download it
        model, tokenizer = load_model(config.model, dtype=config.weights_dtype, device=config.device, trainable=True)
    digest = model_digest(model)
    adapter: Factors = {}
    if config.method in (AUTO, *COEFFICIENTS) and isinstance(model, PeftModel):
        model, adapter = take_apart(model)
    encoder = Encoder(tokenizer, task, room(model, task, config.max_length))
    data = {split: TaskDataset(some, encoder) for split, some in rows.items()}
    set_seed(config.seed)

    def look() -> Sequence[Closure]:
        some = rows["train"][: BATCHES * config.batch_size]
        return task_closures(model, task_batches(model, tokenizer, task, some, config.batch_size))

    config, measured = settle(config, model, look)
    if measured is not None and measured.lr is None:
        console.print("the loss does not curve upwards here, so lr cannot be measured: the method's own is taken")
    model, optimizer = build(config, model)
    if isinstance(optimizer, ZeroOrder) and adapter:
        start_from(optimizer, adapter)
    run = identity(config, digest, training_rows)
    require_agreed(run)
    checkpoint = last_checkpoint(out, run) if resume else None
    args = training_arguments(config, task, str(out))
    leaves_adapter = isinstance(model, PeftModel) or (isinstance(optimizer, ZeroOrder) and optimizer.keeps_coefficients)
    if not leaves_adapter:
        _require_space(config, model, out)

    def forwards(step: int) -> int:
        zero_order = trainer.zero_order
        return zero_order.counters.forwards if zero_order else step * config.accumulate * FIRST_ORDER_STEP

    log = RunLog(out / "metrics.jsonl", forwards, writes=first)
    progress, stop = LiveProgress(console, task.metric, log), Stop(console)
    steps_log = StepLog(out, optimizer, run) if isinstance(optimizer, ZeroOrder) and first else None
    trainer = TaskTrainer(
        model,
        tokenizer,
        task,
        args,
        run,
        config.save_steps,
        config.objective,
        train_dataset=data["train"],
        eval_dataset=data["dev"],
        optimizers=(optimizer, None),
        callbacks=[log, progress, stop],
    )
    if config.seconds or config.eval_seconds:
        trainer.add_callback(Clock(log, config.seconds, config.eval_seconds))
    if steps_log is not None:
        trainer.add_callback(steps_log)
    trainer.add_callback(Watch(trainer, console, log, config.guard, steps_log))

    def validate() -> dict[str, Any]:
        found = trainer.evaluate(data["validation"], metric_key_prefix="validation")
        metrics = {name: found[f"validation_{name}"] for name in (task.metric, *task.also)}
        return {"metrics": metrics, "texts": _texts(trainer, data["validation"])}

    if first:
        if measured is not None:
            write_json(out / "diagnosis.json", asdict(measured))
        config.save(out / "config.yaml")  # from here on there is a run to resume
        if checkpoint is None:
            log.path.unlink(missing_ok=True)
    if checkpoint is None:
        before = validate() | {"dev": trainer.evaluate()[f"eval_{task.metric}"]}
        if first:
            write_json(out / "initial.json", before)
        wait()
    initial = read_json(out / "initial.json")
    console.print(f"{task.title}: {task.metric} {initial['metrics'][task.metric]:.3f} before training")
    console.print(
        f"method {config.method}, lr {config.lr} ({config.schedule})", f", eps {config.eps}" * bool(config.eps), sep=""
    )

    try:
        with warnings.catch_warnings(), stop.heeded():
            warnings.simplefilter("ignore", EstimateWarning)  # `Watch` says it, once it matters
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NoStream as error:
        raise UserError(f"method {config.method}: {error}; agzo and zo-act need none") from error
    except UnpicklingError as error:  # only tensors and plain values are read
        raise UserError(f"{checkpoint} cannot be read: a file in it is damaged, or holds code") from error
    finally:
        progress.stop()

    # Before the best checkpoint brings back the counters of its own moment.
    steps, counters = trainer.state.global_step, trainer.zero_order and trainer.zero_order.counters
    spent = forwards(steps)
    final = best = validate()
    best_folder = out / f"checkpoint-{trainer.state.best_global_step}"
    if trainer.state.best_global_step != trainer.state.global_step and best_folder.is_dir():
        trainer.state.best_model_checkpoint = str(best_folder)
        trainer._load_best_model()
        best = validate()
    if first:
        with whole_folder(out / ("adapter" if leaves_adapter else "model")) as aside:
            trainer.save_model(str(aside))
            (aside / "training_args.bin").unlink(missing_ok=True)
    start, found = initial.get("dev"), trainer.state.best_metric  # no start in a run that an earlier version began
    if start is not None and (found is None or found <= start):
        console.print(f"on the held-out rows nothing was better than before training ({start:.3f})")
    summary = {
        "task": task.name,
        "model": config.model,
        "method": config.method,
        "seed": config.seed,
        "steps": steps,
        "forwards": spent,
        "forwards_before": read_json(out / "diagnosis.json")["forwards"] if (out / "diagnosis.json").is_file() else 0,
        "examples_seen": steps * config.batch_size * config.accumulate,
        "metric": task.metric,
        "initial": initial["metrics"][task.metric],
        "final": final["metrics"][task.metric],
        "best": best["metrics"][task.metric],
        "metrics": {name: [initial["metrics"][name], best["metrics"][name]] for name in initial["metrics"]},
        "best_step": trainer.state.best_global_step,
        "initial_dev": start,
        "best_dev": trainer.state.best_metric,
        "seconds": round(log.seconds, 3),
        "seconds_per_step": round(log.seconds / steps, 4),
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        "skipped": counters.skipped if counters else 0,
        "zero": counters.zero if counters else 0,
        "examples": {split: len(dataset) for split, dataset in data.items()},
        "truncated": {split: dataset.truncated for split, dataset in data.items()},
        "zoft_version": __version__,
    }
    if first:
        write_json(out / "summary.json", summary)
        write_json(out / "examples.json", _examples(task, data["validation"], initial["texts"], best["texts"]))
        write_report(out)
        if config.save_steps is None:
            for folder in (*out.glob("checkpoint-*"), *out.glob(INITIAL)):
                remove(folder)
    return summary


def split(config: TrainConfig, task: Task, rows: list[Row]) -> dict[str, list[Row]]:
    """Of the training `rows` ``train`` and ``dev`` (held out of them, at most a fifth), and ``validation``.

    Of the training rows as many are drawn as the run can see; every draw depends on the seed alone.

    Raises:
        UserError: the data cannot be read, or there are too few rows.
    """
    rest, dev = hold_out(rows, min(config.dev_examples, max(1, len(rows) // 5)), config.seed)
    seen = config.steps * config.batch_size * config.accumulate
    train = sample(rest, config.train_examples or seen, config.seed)
    if len(train) < config.batch_size:
        raise UserError(
            f"a batch of {config.batch_size} is more than the {len(train)} training rows; "
            "lower --batch-size or bring more data"
        )
    validation = load_rows(task, config.data, "validation")
    return {
        "train": train,
        "dev": dev,
        "validation": sample(validation, config.eval_examples or len(validation), 0),
    }


def _require_space(config: TrainConfig, model: Any, out: Path) -> None:
    """Raises UserError if the checkpoints and the result will not fit on the disk."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # The best, the next best while it is written, the result; the last; the initial one.
    needed = size * (3 + (config.save_steps is not None) + config.guard)
    folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{out}: the run needs about {needed / 2**30:.1f} GiB of disk; {free / 2**30:.1f} GiB are free")


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
