"""`zoft replay`: the model of a run rebuilt from the model it began with and its log, without data or forwards."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load

from zoft.errors import UserError
from zoft.optim import ZeroOrder, obstacle, replay
from zoft.train.adapter import save_adapter
from zoft.train.config import TrainConfig
from zoft.train.files import write_folder
from zoft.train.identity import model_digest, require_same, settings
from zoft.train.models import load_model
from zoft.train.optimizers import FIRST_ORDER, build, to_train
from zoft.train.steplog import BACK, BASES, LOG, STEP, Log, Step, names_of, read_back, read_log, read_step


def rebuild(run: Path, to_step: int | None = None, out: Path | None = None) -> dict[str, Any]:
    """Rebuild what the folder `run` held after `to_step` steps (None: all of its log), and save it in `out`.

    That is the model, or the adapter, bit for bit, on the kind of device that the run was on; None for `out` is
    ``replayed-N`` in the run folder.

    Raises:
        UserError: the run's method or log does not allow it, or `out` is there.
    """
    started = time.perf_counter()
    config = TrainConfig.load(run / "config.yaml")
    if config.method in FIRST_ORDER:
        raise UserError(f"method {config.method} is first-order: its gradients are not logged")
    log = read_log(run / LOG)
    steps = log.steps if to_step is None else to_step
    if steps > log.steps:
        torn = f"; {log.torn} bytes after that are torn" if log.torn else ""
        raise UserError(f"{run / LOG} ends after step {log.steps}{torn}: it does not reach step {steps}")
    model: Any
    model, tokenizer = load_model(config.model, **config.loading, trainable=True)
    require_same(settings(config) | {"model": model_digest(model)}, log.run, run / LOG)
    model, adapter = to_train(config.method, model)
    model, optimizer = build(config, model, adapter)
    assert isinstance(optimizer, ZeroOrder)
    if (reason := obstacle(optimizer)) is not None:
        raise UserError(f"method {config.method} cannot be replayed: {reason}")
    _take_steps(optimizer, log.until(steps), run / LOG)

    def write(aside: Path) -> None:
        if optimizer.keeps_coefficients:
            save_adapter(optimizer, aside)
        else:
            model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)

    target = out or run / f"replayed-{steps}"
    write_folder(target, write)
    return {"steps": steps, "out": str(target), "seconds": round(time.perf_counter() - started, 3), "torn": log.torn}


def _take_steps(optimizer: ZeroOrder, log: Log, where: Path) -> None:
    """The steps of `log` again, but for those that it went back from."""
    taken: list[Step] = []
    names, count = names_of(optimizer), 0
    for record in log.records:
        if record.kind == STEP:
            step = read_step(record.body, names)
            if step.number != count:
                raise UserError(f"{where} does not hold all steps: after {count} of them comes number {step.number}")
            taken.append(step)
            count += 1
        elif record.kind == BACK:
            to = read_back(record.body).to
            taken = [step for step in taken if step.number < to]
    kept = log.last(BASES)
    if kept is not None and not optimizer.bases:  # those of an adapter are there
        bases = load(kept)
        optimizer.set_bases({m.name: bases[m.name].to(m.device) for m in optimizer.maps if m.name in bases})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run has said what there was to say
        for step in taken:
            replay(optimizer, *step)
