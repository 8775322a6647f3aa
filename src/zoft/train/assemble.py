"""From a configuration to everything that a run takes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers.trainer_utils import set_seed

from zoft.data import Encoder, Row, Task, TaskDataset, hold_out, load_rows, sample
from zoft.errors import UserError
from zoft.optim import ZeroOrder
from zoft.optim.landscape import Closure
from zoft.optim.ranks import Ranks
from zoft.train.arguments import training_arguments
from zoft.train.arithmetic import settle_arithmetic
from zoft.train.auto import BATCHES, settle
from zoft.train.batches import task_batches, task_closures
from zoft.train.callbacks import Clock, LiveProgress, RunLog, StepLog
from zoft.train.checkpoints import last_checkpoint
from zoft.train.config import LOSS, TrainConfig
from zoft.train.diagnosis import Diagnosis
from zoft.train.guard import INITIAL
from zoft.train.identity import identity, model_digest
from zoft.train.models import find_device, load_model, room
from zoft.train.offload import kept
from zoft.train.optimizers import build, to_train
from zoft.train.processes import one_after_the_first, require_agreed
from zoft.train.steplog import LOG
from zoft.train.stop import Stop
from zoft.train.task_trainer import TaskTrainer
from zoft.train.watch import Watch

FIRST_ORDER_STEP = 3  # forwards that a forward and a backward cost
LEFT = (  # by a run in its folder, after config.yaml
    *("model", "adapter", INITIAL, "checkpoint-*"),
    *("initial.json", "summary.json", "examples.json", "metrics.jsonl", LOG, "report.html"),
)
ANSWERS = 0.5  # share of the tokens learned from which going through attention is worth its time (docs/guided.md)


@dataclass
class Run:
    """A run that is ready to train, of a `config` that leaves nothing open, or to go on from a `checkpoint`.

    `measured` is what `config` was settled by, if anything had to be measured. Of several processes only the `first`
    writes.
    """

    config: TrainConfig
    task: Task
    data: dict[str, TaskDataset]
    trainer: TaskTrainer
    checkpoint: Path | None
    measured: Diagnosis | None
    log: RunLog
    progress: LiveProgress
    stop: Stop
    first: bool

    @property
    def out(self) -> Path:
        """The run folder."""
        return Path(self.config.out)

    @property
    def leaves_adapter(self) -> bool:
        """Whether the result is a PEFT adapter, and no model."""
        return isinstance(self.trainer.model, PeftModel) or self.trainer._saves_adapter


def assemble(config: TrainConfig, console: Console, resume: bool, first: bool) -> Run:
    """Load and make what the run of `config` takes; nothing is written.

    Raises:
        UserError: the configuration, the model, the rows or the checkpoint cannot be used.
    """
    task, out = config.load_task(), Path(config.out)
    config.check_objective(task)
    if config.first_order and Ranks().count > 1:
        raise UserError(f"{config.method} is a reference and runs in one process: start it without torchrun")
    if config.memory is not None and Ranks().count > 1:
        raise UserError("weights are offloaded in one process: leave memory out, or start zoft without torchrun")
    if not resume:
        _require_free(out)
    training_rows = load_rows(task, config.data, "train")
    rows = split(config, task, training_rows)
    console.print(f"loading {config.model}")
    model: Any
    with one_after_the_first():  # which may have to download it
        model, tokenizer = load_model(config.model, **config.loading, trainable=True)
    if config.memory is not None:
        console.print(f"{kept(model)} of the weights stay in place, the rest is loaded as it is needed")
    config = replace(config, compute_dtype=settle_arithmetic(model, config.compute_dtype))
    digest = model_digest(model)
    model, adapter = to_train(config.method, model)
    encoder = Encoder(tokenizer, task, room(model, task, config.max_length))
    task = encoder.task
    data = {split: TaskDataset(some, encoder) for split, some in rows.items()}
    set_seed(config.seed)

    def look() -> Sequence[Closure]:
        some = rows["train"][: BATCHES * config.batch_size]
        return task_closures(model, task_batches(model, tokenizer, task, some, config.batch_size, config.max_length))

    labels = task.kind in ("classification", "choice")
    whole = config.objective == LOSS and (labels or data["train"].learned >= ANSWERS)
    config, measured = settle(config, model, look, whole, adapter)
    if measured is not None and measured.lr is None:
        console.print("the loss does not curve upwards here, so lr cannot be measured: the method's own is taken")
    model, optimizer = build(config, model, adapter)
    run = identity(config, digest, training_rows)
    require_agreed(run)
    checkpoint = last_checkpoint(out, run) if resume else None

    def forwards(step: int) -> int:
        zero_order = trainer.zero_order
        return zero_order.counters.forwards if zero_order else step * config.accumulate * FIRST_ORDER_STEP

    log = RunLog(out / "metrics.jsonl", forwards, find_device(config.device), writes=first)
    progress, stop = LiveProgress(console, task.metric, log), Stop(console)
    steps_log = StepLog(out, optimizer, run) if isinstance(optimizer, ZeroOrder) and first else None
    trainer = TaskTrainer(
        model,
        tokenizer,
        task,
        training_arguments(config, task, str(out)),
        run,
        config.save_steps,
        config.objective,
        config.samples,
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
    made = Run(config, task, data, trainer, checkpoint, measured, log, progress, stop, first)
    if not made.leaves_adapter:
        _require_space(config, model, out)
    return made


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


def _require_free(out: Path) -> None:
    """Raises UserError if `out` holds a run, or files of the user's own that one would write or delete."""
    if (out / "config.yaml").exists():
        raise UserError(f"{out} holds a run already: choose another --out, or continue it with --resume {out}")
    taken = sorted(path.name for pattern in LEFT for path in out.glob(pattern))
    if taken:
        raise UserError(f"{out} is no run, but holds {taken[0]!r}, which a run would replace: choose another --out")


def _require_space(config: TrainConfig, model: Any, out: Path) -> None:
    """Raises UserError if the checkpoints and the result will not fit on the disk."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # The best, the next best while it is written, the result; the last; the initial one.
    needed = size * (3 + (config.save_steps is not None) + config.guard)
    folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{out}: the run needs about {needed / 2**30:.1f} GiB of disk; {free / 2**30:.1f} GiB are free")
