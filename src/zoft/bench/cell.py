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
from zoft.report.run import read_run
from zoft.train.files import locked, write_json, write_text

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
