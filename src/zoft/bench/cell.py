"""One run of a suite: a process of its own, and the JSON that is kept of it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from zoft.bench.process import run_zoft
from zoft.bench.suite import EVAL_FLAGS, Cell
from zoft.report.run import read_run
from zoft.train.files import write_json, write_text

Record = dict[str, Any]


def run_cell(cell: Cell, file: Path, data: Path | None) -> None:
    """Run `cell`, and leave its record in `file`.

    data: the folder with a folder of rows for each task; None for what the suite says, or the hub's data.

    A record is the summary of `zoft train` (or what `zoft eval` says, its metric as `best`) and: `row`, `lr`, `seed`,
    `failed` (null, or what ended it, and then there is no summary), `elapsed` (seconds of the whole
    process), `command`, `settings`, and `curve`, the metric on the held-out rows along the run.

    Raises:
        UserError: the run refuses its settings or its data.
    """
    folder = file.with_name(f".{file.stem}")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(parents=True)
    try:
        command, started = _command(cell, folder), time.perf_counter()
        place = data / cell.settings.get("data", cell.task) if data else cell.settings.get("data")
        where = ["--data", str(place)] if place else []
        out, failed = run_zoft([*command, *where], cell.name)
        elapsed = round(time.perf_counter() - started, 1)
        record: Record = {"task": cell.task, "row": cell.row, "lr": cell.rate, "seed": cell.seed}
        record |= {"failed": failed, "elapsed": elapsed}
        if failed is None:
            record |= _trained(folder / "run", cell) if cell.rate else _evaluated(json.loads(out))
        shown = ["zoft", *command, *(["--data", f"DATA/{cell.task}"] if data else where)]
        record["command"] = " ".join(shown).replace(f"{folder}{os.sep}", "")
        write_json(file, record | {"settings": cell.settings})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _command(cell: Cell, folder: Path) -> list[str]:
    """The arguments of ``zoft``, but for the data; the settings of a training are in a file in `folder`."""
    settings = {name: value for name, value in cell.settings.items() if name != "data"}
    if cell.rate:
        write_text(folder / "cell.yaml", yaml.safe_dump(settings, sort_keys=False))
        return ["train", "--config", str(folder / "cell.yaml"), "--out", str(folder / "run")]
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
    """Whether this process alone may make `file`, until the block ends: not if it is there, or another is at it.

    A lock file beside it holds the number of the process; one of a process that has died is taken over.
    """
    lock, ours = file.with_suffix(".lock"), False
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        ours = _acquire(lock)
        yield ours and not file.exists()
    finally:
        if ours:
            lock.unlink(missing_ok=True)


def _acquire(lock: Path) -> bool:
    if _create(lock):
        return True
    owner = _owner(lock)
    if owner is None or _runs(owner):
        return False
    guard = lock.with_suffix(".takeover")  # two processes may have seen that the owner is dead
    if not _create(guard):
        return False
    try:
        dead = _owner(lock) == owner
        if dead:
            write_text(lock, str(os.getpid()))
        return dead
    finally:
        guard.unlink()


def _create(lock: Path) -> bool:
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def _owner(lock: Path) -> int | None:
    """The process named in a lock file; None if it is gone, or not written yet."""
    try:
        return int(lock.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _runs(process: int) -> bool:
    """Whether there is such a process."""
    if os.name == "nt":
        return True  # asking by a signal, as below, would end it there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
