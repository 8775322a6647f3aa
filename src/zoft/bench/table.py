"""What a suite's results come to: tables and curves, from the recorded runs alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from zoft.bench.accuracy import Results, Standing
from zoft.bench.cell import Record
from zoft.data import load_task
from zoft.report.plots import Point, save_curves
from zoft.report.text import duration, size
from zoft.train.files import write_text

NONE = "–"
COSTS = ("forwards", "seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class Sheet:
    """A table: its title, the names of its columns, and its rows as text."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As Markdown."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        lines = [self.columns, ["---"] * len(self.columns), *rows]
        return f"{self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def parts(self, width: int, gap: int = 2) -> list[Sheet]:
        """The sheet as one or more, each the first column and as many of the others as fit into `width` characters."""
        widths = [max(map(len, cells)) + gap for cells in zip(self.columns, *self.rows, strict=True)]
        groups: list[list[int]] = [[0]]
        for column in range(1, len(widths)):
            if len(groups[-1]) > 1 and sum(widths[i] for i in (*groups[-1], column)) > width:
                groups.append([0])
            groups[-1].append(column)
        return [
            replace(self, columns=[self.columns[i] for i in group], rows=[[row[i] for i in group] for row in self.rows])
            for group in groups
        ]


def facts(results: Results) -> dict[str, Any]:
    """Everything that the tables show, as JSON: by row and task, and the mean over tasks.

    A failed run counts as the untrained model. `mean` and `sem` (its standard error, null for one seed) are over the
    seeds run so far, null if there are none; the mean over tasks is null while one of them is.
    """
    suite = results.suite
    rows: dict[str, Any] = {}
    for row in suite.methods:
        tasks = {task: _task_facts(results, task, results.standing(task, row)) for task in suite.tasks}
        means = [found["mean"] for found in tasks.values()]
        rows[row] = {"tasks": tasks, "mean": None if None in means else fmean(means)}
    metrics = {
        task: {"metric": load_task(task).metric, "seeds": list(plan.seeds)} for task, plan in suite.tasks.items()
    }
    return {"model": suite.model, "tasks": metrics, "methods": rows}


def _task_facts(results: Results, task: str, standing: Standing) -> dict[str, Any]:
    untrained = results.zero_shot(task)
    values = {seed: untrained if run["failed"] else run["best"] for seed, run in standing.runs.items()}
    known = [value for value in values.values() if value is not None]
    ended = [run for run in standing.runs.values() if not run["failed"]]
    return {
        "mean": fmean(known) if known else None,
        "sem": stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None,
        "values": values,
        "missing": [cell.seed for cell in standing.ready] if standing.runs else [],
        "lr": standing.rate,
        "search": {rate: run and run.get("best_dev") for rate, run in standing.tried.items()},
        "failed": {_name(run): run["failed"] for run in standing.records if run["failed"]},
    } | {name: [run[name] for run in ended] for name in COSTS}


def _name(run: Record) -> str:
    return ", ".join([*([f"lr {run['lr']}"] if run["lr"] else []), f"seed {run['seed']}"])


def sheets(found: dict[str, Any]) -> list[Sheet]:
    """The result, the search for learning rates, and what failed, from `facts`."""
    tasks = found["tasks"]
    of_row = {row: fact["tasks"] for row, fact in found["methods"].items()}
    heads = [name if fact["metric"] == "accuracy" else f"{name} ({fact['metric']})" for name, fact in tasks.items()]
    result = Sheet(
        f"{found['model']}: accuracy, or the metric named, in percent of the validation rows; mean ± standard error",
        ["method", *heads, "mean", "forwards", "training", "peak memory"],
        [
            [row, *map(_result, of.values()), _percent(found["methods"][row]["mean"]), *_costs(of)]
            for row, of in of_row.items()
        ],
    )
    searched = [task for task in tasks if any(of[task]["search"] for of in of_row.values())]
    search = Sheet(
        "Search, learning rate: the same metric on held-out rows, with the first seed",
        ["method", *searched],
        [
            [row, *(_search(of[task]) for task in searched)]
            for row, of in of_row.items()
            if any(of[task]["search"] for task in searched)
        ],
    )
    failures = Sheet(
        "Failed, and counted as the untrained model",
        ["method", "task", "run", "why"],
        [
            [row, task, run, line]
            for row, of in of_row.items()
            for task, fact in of.items()
            for run, line in fact["failed"].items()
        ],
    )
    return [sheet for sheet in (result, search, failures) if sheet.rows]


def _result(fact: dict[str, Any]) -> str:
    ended, runs, missing = len(fact["forwards"]), len(fact["values"]), len(fact["missing"])
    notes = [f"{runs} of {runs + missing} seeds"] if missing else []
    notes += [f"{runs - ended} of {runs} failed"] if ended < runs else []
    spread = f" ± {_percent(fact['sem'])}" if fact["sem"] is not None else ""
    return _percent(fact["mean"]) + spread + (f" ({', '.join(notes)})" if notes else "")


def _costs(of: dict[str, Any]) -> list[str]:
    """Forwards, seconds of training and the peak of memory over the runs of all tasks."""
    forwards, seconds, memory = ([value for fact in of.values() for value in fact[name]] for name in COSTS)
    trained = any(forwards)
    return [
        "–".join(str(value) for value in sorted({min(forwards), max(forwards)})) if trained else NONE,
        duration(fmean(seconds)) if trained else NONE,
        size(max(memory)) if memory else NONE,
    ]


def _search(fact: dict[str, Any]) -> str:
    shown = (
        f"{rate}: {_percent(dev)}{' (chosen)' if rate == fact['lr'] else ''}" for rate, dev in fact["search"].items()
    )
    return ", ".join(shown) or NONE


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def curves(results: Results) -> dict[str, dict[str, list[Point]]]:
    """The metric on held-out rows along the runs that count, mean over seeds, by task and row."""
    found: dict[str, dict[str, list[Point]]] = {}
    for (task, row), standing in results.all().items():
        runs = [run["curve"] for run in standing.runs.values() if not run["failed"] and run["curve"]]
        if runs:
            found.setdefault(task, {})[row] = [
                (
                    fmean(p["forwards"] for p in points),
                    fmean(p["seconds"] for p in points),
                    fmean(p["value"] for p in points),
                )
                for points in zip(*runs, strict=False)  # runs of equal seconds may differ in their evaluations
            ]
    return found


def write_tables(results: Results) -> dict[str, Any]:
    """Write ``table.md`` and, once something is trained, ``curves.png`` into the results' folder; return `facts`."""
    found = facts(results)
    results.out.mkdir(parents=True, exist_ok=True)
    write_text(results.out / "table.md", "\n".join(sheet.markdown() for sheet in sheets(found)))
    if panels := curves(results):
        titles = {task: f"{load_task(task).title}: {load_task(task).metric}, held-out rows" for task in panels}
        save_curves(results.out / "curves.png", {titles[task]: panel for task, panel in panels.items()})
    return found
