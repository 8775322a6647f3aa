"""A suite's runs, each a process of its own whose result is one JSON file; what there is of them is not run again.

The files are all the state there is: from them follows what to run next, so a suite can be stopped, started again, and
worked on by several processes at once, which claim a run by a lock file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean

from rich.console import Console

from zoft.bench.cell import Record, claimed, run_cell
from zoft.bench.rates import rate_name, search
from zoft.bench.suite import ZERO_SHOT, Cell, Suite
from zoft.errors import UserError
from zoft.report.text import duration, size
from zoft.train.files import read_json

POLL = 5.0  # seconds between looks at what other processes have finished


@dataclass(frozen=True)
class Standing:
    """How far one method is on one task.

    `tried` holds the results of the search by rate, None where one is still to come; `rate` is the chosen one, None
    while it is not known, and for what needs no training. `runs` are the results by seed, `ready` the runs that can be
    made now (of another task, if the rate is sought there), `later` the number of those that follow at least.
    """

    tried: dict[str, Record | None]
    rate: str | None
    runs: dict[int, Record]
    ready: list[Cell]
    later: int

    @property
    def records(self) -> list[Record]:
        """Every result there is, once each."""
        found = [record for record in (*self.tried.values(), *self.runs.values()) if record is not None]
        return list({id(record): record for record in found}.values())


class Results:
    """The files of `suite` in the folder `out`; each is read once."""

    def __init__(self, suite: Suite, out: Path) -> None:
        self.suite, self.out = suite, out
        self._read: dict[str, Record] = {}

    def path(self, cell: Cell) -> Path:
        """The file of a run."""
        return self.out / f"{cell.name}.json"

    def find(self, cell: Cell) -> Record | None:
        """The result of a run, None if there is none yet.

        Raises:
            UserError: the file is unreadable, or of a run with other settings.
        """
        if cell.name not in self._read:
            try:
                record = read_json(self.path(cell))
                settings = record["settings"]
            except FileNotFoundError:
                return None
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"cannot read {self.path(cell)} ({error!r}); move it away") from error
            _require_same(self.path(cell), settings, json.loads(json.dumps(cell.settings)))
            self._read[cell.name] = record
        return self._read[cell.name]

    def all(self) -> dict[tuple[str, str], Standing]:
        """The standing of every method on every task, by task and method."""
        return {(task, row): self.standing(task, row) for task in self.suite.tasks for row in self.suite.methods}

    def standing(self, task: str, row: str) -> Standing:
        """How far the method `row` is on `task`."""
        suite, method, seeds = self.suite, self.suite.methods[row], self.suite.tasks[task].seeds
        first = None if method.shots is not None else rate_name(method.lr)
        if not method.search:
            return self._with_rate(task, row, first, {})
        if isinstance(method.search, str) and task != method.search:
            elsewhere = self.standing(method.search, row)
            if elsewhere.rate is not None:
                return self._with_rate(task, row, elsewhere.rate, {})
            return Standing({}, None, {}, elsewhere.ready, len(seeds))
        assert first is not None
        cells: dict[str, Cell] = {}

        def worth(rate: str) -> tuple[float, bool] | None:
            cells[rate] = suite.cell(task, row, rate, seeds[0])
            return self._worth(cells[rate])

        found, best = search(first, worth, suite.max_rates)
        tried = {rate: self.find(cells[rate]) for rate in found}
        if best is not None:
            return self._with_rate(task, row, best, tried)
        return Standing(tried, None, {}, [cells[rate] for rate in found if tried[rate] is None], len(seeds) - 1)

    def _with_rate(self, task: str, row: str, rate: str | None, tried: dict[str, Record | None]) -> Standing:
        seeds = self.suite.tasks[task].seeds
        if self.suite.methods[row].shots == 0:
            seeds = seeds[:1]  # nothing in it is drawn
        cells = [self.suite.cell(task, row, rate, seed) for seed in seeds]
        runs = {cell.seed: record for cell in cells if (record := self.find(cell)) is not None}
        return Standing(tried, rate, runs, [cell for cell in cells if cell.seed not in runs], 0)

    def _worth(self, cell: Cell) -> tuple[float, bool] | None:
        """The metric on held-out rows; a failed run has zero-shot's, and is worth less than one that ended with it."""
        record = self.find(cell)
        if record is None:
            return None
        if record["failed"] is None:
            return record["best_dev"], True
        return self.zero_shot(cell.task) or 0.0, False

    def zero_shot(self, task: str) -> float | None:
        """The metric of the untrained model on the validation rows; None if it is not known."""
        record = self.find(self.suite.cell(task, ZERO_SHOT, None, self.suite.tasks[task].seeds[0]))
        return None if record is None else record.get("best")


def run_suite(results: Results, data: Path | None, only: Sequence[str], console: Console) -> None:
    """Make every run of the suite that is missing and whose ``TASK/METHOD`` matches a shell pattern in `only`.

    First seeds come first, so that every row has one figure before any has three.

    data: the folder that holds a folder of rows for each task; None for what the suite says, or the hub's data.

    Raises:
        UserError: a pattern matches nothing, or a run refuses its settings or its data.
    """
    waiting = False
    while True:
        standings = results.all()
        for pattern in only:
            if not any(fnmatchcase("/".join(place), pattern) for place in standings):
                raise UserError(f"--only {pattern}: the suite has no TASK/METHOD like it")
        places = {place: s for place, s in standings.items() if any(fnmatchcase("/".join(place), p) for p in only)}
        ready = [cell for standing in places.values() for cell in standing.ready]
        ready.sort(key=lambda cell: results.suite.tasks[cell.task].seeds.index(cell.seed))
        if not ready:
            return
        for cell in ready:
            with claimed(results.path(cell)) as ours:
                if not ours:
                    continue
                done = sum(len(standing.records) for standing in places.values())
                left = sum(len(standing.ready) + standing.later for standing in places.values())
                console.print(f"{done + 1} of about {done + left}: {cell.name}", style="bold")
                with console.status("running"):
                    run_cell(cell, results.path(cell), data)
            record = results.find(cell)
            assert record is not None
            console.print(f"  {describe(record)}; about {duration(seconds_left(results, places))} left")
            waiting = False
            break
        else:
            if not waiting:
                names = dict.fromkeys(cell.name for cell in ready)
                console.print(f"waiting for runs of other processes: {', '.join(names)}")
            waiting = True
            time.sleep(POLL)


def describe(record: Record) -> str:
    """What a run came to, in words."""
    if record["failed"] is not None:
        return f"failed: {record['failed']}"
    facts = [f"{record['metric']} {record['best']:.3f}"]
    if record["lr"] is not None:
        facts += [f"dev {record['best_dev']:.3f}", f"{record['forwards']} forwards in {duration(record['seconds'])}"]
    return ", ".join([*facts, size(record["peak_memory_bytes"])])


def seconds_left(results: Results, places: Iterable[tuple[str, str]]) -> float:
    """How long one process has still to go, at least.

    A run is taken to last as long as those of its method on its task have so far, or on any task, or else as any run.
    """
    standings = results.all()
    taken = {place: [record["elapsed"] for record in s.records] for place, s in standings.items()}
    every = [seconds for some in taken.values() for seconds in some]
    left = 0.0
    for place in places:
        of_row = [seconds for (_, row), some in taken.items() if row == place[1] for seconds in some]
        left += (len(standings[place].ready) + standings[place].later) * fmean(taken[place] or of_row or every)
    return left


def _require_same(file: Path, recorded: Record, wanted: Record) -> None:
    """Raises UserError, with the first difference, if a file is of other settings than those wanted."""
    for name in {**wanted, **recorded}:
        if recorded.get(name) != wanted.get(name):
            raise UserError(
                f"{file} was run with {name} {recorded.get(name)}; the suite now has {wanted.get(name)}: "
                "move the file away, or choose another --out"
            )
