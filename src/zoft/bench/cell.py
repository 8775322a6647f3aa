"""One run of a suite: a process of its own, and the JSON that is kept of it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout

from zoft.bench.process import run_zoft
from zoft.bench.suite import EVAL_FLAGS, Cell
from zoft.errors import UserError
from zoft.report.run import read_run
from zoft.train.files import locked, write_json, write_text

Record = dict[str, Any]


def run_cell(cell: Cell, file: Path, data: Path | None) -> None:
    """Run `cell`, and leave its record in `file`.

    data: the folder with a folder of rows for each task; None for what the suite says, or the hub's data.

    A record is the summary of `zoft train` (or what `zoft eval` says, its metric as `best`) and: `row`, `lr`, `seed`,
    `failed` (null, or what ended it, and then there is no summary), `elapsed` (seconds that its processes
    took), `command`, `settings`, and `curve`, the metric on the held-out rows along the run.

    A training of the same settings that was stopped goes on from its last checkpoint.

    Raises:
        UserError: the run refuses its settings or its data.
    """
    folder = file.with_name(f".{file.stem}")
    run, started, command = folder / "run", _begin(cell, folder), _command(cell, folder)
    place = data / cell.settings.get("data", cell.task) if data else cell.settings.get("data")
    where = ["--data", str(place)] if place else []
    stopped = _holds_run(run)
    try:
        out, failed = run_zoft(["train", "--resume", str(run)] if stopped else [*command, *where], cell.name)
        record: Record = {"task": cell.task, "row": cell.row, "lr": cell.rate, "seed": cell.seed}
        record |= {"failed": failed, "elapsed": round(time.time() - started, 1)}
        if failed is None:
            record |= _trained(run, cell) if cell.rate else _evaluated(json.loads(out))
        shown = ["zoft", *command, *(["--data", f"DATA/{cell.task}"] if data else where)]
        record["command"] = " ".join(shown).replace(f"{folder}{os.sep}", "")
        write_json(file, record | {"settings": cell.settings})
    except UserError as error:
        raise UserError(f"{error}. To begin this run anew, remove {folder}") if stopped else error from None
    finally:
        if file.exists() or not _holds_run(run):
            shutil.rmtree(folder, ignore_errors=True)


def _begin(cell: Cell, folder: Path) -> float:
    """When the run of `cell` began, in seconds as of `time.time`, less the time between its processes.

    `folder` is left with the run that was stopped there, or with the settings alone.
    """
    file, settings = folder / "cell.yaml", {name: value for name, value in cell.settings.items() if name != "data"}
    if cell.rate:
        settings["save_steps"] = cell.settings["eval_steps"]
    text, taken = yaml.safe_dump(settings, sort_keys=False), 0.0
    if _holds_run(folder / "run") and file.read_text(encoding="utf-8") == text:
        taken = max(path.stat().st_mtime for path in folder.rglob("*")) - file.stat().st_mtime
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_text(file, text)
    started = time.time() - taken
    os.utime(file, (started, started))
    return started


def _holds_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _command(cell: Cell, folder: Path) -> list[str]:
    """The arguments of ``zoft``, but for the data; those of a training are in a file in `folder`."""
    if cell.rate:
        return ["train", "--config", str(folder / "cell.yaml"), "--out", str(folder / "run")]
    settings = cell.settings
    flags = {"--task": cell.task, "--shots": settings["shots"], "--seed": cell.seed}
    flags |= {flag: settings[name] for name, flag in EVAL_FLAGS.items() if settings.get(name) is not None}
    return ["eval", settings["model"], *(str(part) for pair in flags.items() for part in pair), "--json"]


def _trained(folder: Path, cell: Cell) -> Record:
    run = read_run(folder)
    assert run.summary is not None

    def forwards(step: int, counted: int) -> int:
        return counted if cell.step_cost is None else step * cell.step_cost

    curve = [
        {"forwards": forwards(line["step"], line["forwards"]), "seconds": line["seconds"], "value": value}
        for line in run.evaluations
        if (value := line.get(f"eval_{run.metric}")) is not None
    ]
    counted = forwards(run.summary["steps"], run.summary["forwards"])
    return run.summary | {"forwards": counted, "curve": curve}


def _evaluated(found: Record) -> Record:
    return found | {"best": found[found["metric"]], "forwards": 0, "curve": []}


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Whether this process alone may make `file`, until the block ends: not if it is there, or another is at it."""
    path = file.with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except Timeout:
            yield False
        else:
            yield not file.exists()
