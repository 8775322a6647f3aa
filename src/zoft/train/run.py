"""`zoft train`: from a configuration to a run folder."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from rich.console import Console

from zoft import __version__
from zoft.data import Row, Task, TaskDataset, is_reward, score_each
from zoft.errors import UserError
from zoft.numbers import read_back
from zoft.optim import EstimateWarning, NoStream, NotRepeatable
from zoft.report import write_report
from zoft.train.assemble import Run, assemble
from zoft.train.checkpoints import remove, whole_folder
from zoft.train.config import TrainConfig
from zoft.train.files import read_json, write_json
from zoft.train.guard import INITIAL
from zoft.train.models import find_device
from zoft.train.processes import agreed, held, join, wait
from zoft.train.task_trainer import TaskTrainer

EXAMPLES_SHOWN = 6


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
        run = assemble(config, console, resume, first)
        initial = _begin(run, console)
        _fit(run)
        return _end(run, console, initial)


def _begin(run: Run, console: Console) -> dict[str, Any]:
    """Make the folder that of a run, and return what the model was worth before training."""
    config, task = run.config, run.task
    if run.first:
        if run.measured is not None:
            write_json(run.out / "diagnosis.json", asdict(run.measured))
        config.save(run.out / "config.yaml")  # from here on there is a run to resume
        if run.checkpoint is None:
            run.log.path.unlink(missing_ok=True)
    if run.checkpoint is None:
        before = _validate(run) | {"dev": run.trainer.evaluate()[f"eval_{task.metric}"]}
        if run.first:
            write_json(run.out / "initial.json", before)
        wait()
    initial = read_json(run.out / "initial.json")
    initial["metrics"] = read_back(initial["metrics"])
    console.print(f"{task.title}: {task.metric} {initial['metrics'][task.metric]:.3f} before training")
    console.print(
        f"method {config.method}, lr {config.lr} ({config.schedule})", f", eps {config.eps}" * bool(config.eps), sep=""
    )
    return initial


def _fit(run: Run) -> None:
    try:
        with warnings.catch_warnings(), run.stop.heeded():
            warnings.simplefilter("ignore", EstimateWarning)  # `Watch` says it, once it matters
            run.trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    except NoStream as error:
        raise UserError(f"method {run.config.method}: {error}; agzo and zo-act go back along no stream") from error
    except NotRepeatable as error:
        raise UserError(f"method {run.config.method}: {error}") from error
    except UnpicklingError as error:  # only tensors and plain values are read
        raise UserError(f"{run.checkpoint} cannot be read: a file in it is damaged, or holds code") from error
    finally:
        run.progress.stop()


def _end(run: Run, console: Console, initial: dict[str, Any]) -> dict[str, Any]:
    """Leave the best model and what the run came to in its folder."""
    trainer, out, state = run.trainer, run.out, run.trainer.state
    # Before the best checkpoint brings back the counters of its own moment.
    steps, counters = state.global_step, trainer.zero_order and trainer.zero_order.counters
    summary = _facts(run, steps) | {
        "skipped": counters.skipped if counters else 0,
        "zero": counters.zero if counters else 0,
    }
    final = best = _validate(run)
    best_folder = out / f"checkpoint-{state.best_global_step}"
    if state.best_global_step != steps and best_folder.is_dir():
        state.best_model_checkpoint = str(best_folder)
        trainer._load_best_model()
        best = _validate(run)
    start, found = initial.get("dev"), state.best_metric  # no start in a run that an earlier version began
    if start is not None and (found is None or found <= start):
        console.print(f"on the held-out rows nothing was better than before training ({start:.3f})")
    metric = run.task.metric
    summary |= {
        "initial": initial["metrics"][metric],
        "final": final["metrics"][metric],
        "best": best["metrics"][metric],
        "metrics": {name: [initial["metrics"][name], best["metrics"][name]] for name in initial["metrics"]},
        "best_step": state.best_global_step,
        "initial_dev": start,
        "best_dev": state.best_metric,
        "peak_memory_bytes": run.log.peak_memory_bytes,
    }
    if run.first:
        with whole_folder(out / ("adapter" if run.leaves_adapter else "model")) as aside:
            trainer.save_model(str(aside))
            (aside / "training_args.bin").unlink(missing_ok=True)
        write_json(out / "summary.json", summary)
        examples = _examples(run.task, run.data["validation"], initial["texts"], best["texts"])
        write_json(out / "examples.json", examples)
        write_report(out)
        if run.config.save_steps is None:
            for folder in (*out.glob("checkpoint-*"), *out.glob(INITIAL)):
                remove(folder)
    return summary


def _facts(run: Run, steps: int) -> dict[str, Any]:
    """What a summary says of the run itself."""
    config, diagnosis = run.config, run.out / "diagnosis.json"
    return {
        "task": run.task.name,
        "model": config.model,
        "method": config.method,
        "seed": config.seed,
        "steps": steps,
        "forwards": run.log.forwards(steps),
        "forwards_before": read_json(diagnosis)["forwards"] if diagnosis.is_file() else 0,
        "examples_seen": _seen(len(run.data["train"]), config.batch_size, config.accumulate, steps),
        "metric": run.task.metric,
        "seconds": round(run.log.seconds, 3),
        "seconds_per_step": round(run.log.seconds / steps, 4),
        "examples": {split: len(dataset) for split, dataset in run.data.items()},
        "truncated": {split: dataset.truncated for split, dataset in run.data.items()},
        "zoft_version": __version__,
    }


def _seen(rows: int, batch: int, accumulate: int, steps: int) -> int:
    """How many examples so many `steps` took; of an epoch, the last is of what is left of its `rows`."""
    epochs, rest = divmod(steps, math.ceil(rows / (batch * accumulate)))
    return epochs * rows + min(rows, rest * batch * accumulate)


def _validate(run: Run) -> dict[str, Any]:
    """The metrics on the validation rows, and what was predicted for the first of them."""
    found = run.trainer.evaluate(run.data["validation"], metric_key_prefix="validation")
    metrics = {name: found[f"validation_{name}"] for name in (run.task.metric, *run.task.also)}
    return {"metrics": metrics, "texts": _texts(run.trainer, run.data["validation"])}


def _texts(trainer: TaskTrainer, dataset: TaskDataset) -> list[str]:
    """What was predicted for the first rows, as text; where nothing is, how likely the answer's tokens were."""
    rows, predictions = dataset.rows[:EXAMPLES_SHOWN], trainer.predictions
    if trainer.task.kind == "text":
        return [f"likelihood {math.exp(-predictions[i]):.3f}" for i in range(len(rows))]
    return [
        str(found) if isinstance(found := predictions[i], str) else trainer.task.choices(row)[found]
        for i, row in enumerate(rows)
    ]


def _examples(task: Task, dataset: TaskDataset, before: list[str], after: list[str]) -> list[dict[str, Any]]:
    found = []
    for row, old, new in zip(dataset.rows[:EXAMPLES_SHOWN], before, after, strict=True):
        outputs = {"before": old, "after": new}
        right = {when: _right(task, row, text) for when, text in outputs.items()}
        answer = task.choices(row)[task.golds(row)[0]]
        found.append({"prompt": task.show(row), "answer": answer, **outputs, "right": right})
    return found


def _right(task: Task, row: Row, text: str) -> bool | None:
    """Whether `text`, which was predicted, is right as the metric has it, if that says so."""
    if task.kind == "text" or is_reward(task.metric):
        return None
    if task.kind == "generation":
        return score_each(task, task.metric, [text], [row]) == [1]
    return text in [task.choices(row)[gold] for gold in task.golds(row)]
