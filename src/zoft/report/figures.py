"""The key figures of a run, and what they rest on, in words."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from . import text
from .run import Run

# Metrics that are means of zeros and ones: their standard error over n examples is at most .5 / sqrt(n).
COUNTED = ("accuracy", "exact_match", "number_match")


class Tile(NamedTuple):
    """One key figure."""

    label: str
    value: str
    note: str = ""


def headline(run: Run) -> str:
    """The run in one sentence, its result being the model kept, or the last one while the run goes on."""
    results = run.results
    method, task = _method_title(results["method"]), _task_title(results["task"])
    model = Path(str(results["model"])).name
    scope = ""
    if "forwards" in results:
        scope = f" in {text.number(results['forwards'])} forwards, {text.duration(results['seconds'])}"
    if run.summary is None:
        scope += " so far"
    if run.metric is None or "initial" not in results:
        return f"{method} trained {model} on {task}{scope}"
    before = text.score(run.metric, results["initial"])
    after = text.score(run.metric, results["final" if run.summary is None else "best"])
    return f"{method} took {model} from {before} to {after} {text.words(run.metric)} on {task}{scope}"


def tiles(run: Run) -> list[Tile]:
    """The key figures, as far as they are known."""
    results, found = run.results, []
    if run.metric is not None and "initial" in results:
        initial = results["initial"]
        found.append(Tile("Before", text.score(run.metric, initial)))
        names = {"final": "Now", "best": "Best"} if run.summary is None else {"best": "Kept", "final": "At the end"}
        for key, label in names.items():
            value = results[key]
            found.append(Tile(label, text.score(run.metric, value), text.change(run.metric, value - initial)))
    for key, label, show in (
        ("forwards", "Forwards", text.number),
        ("seconds", "Time", text.duration),
        ("seconds_per_step", "A step", text.duration),
        ("peak_memory_bytes", "Peak memory", text.size),
    ):
        if key in results:
            found.append(Tile(label, show(results[key])))
    skipped = results.get("skipped", 0) + results.get("zero", 0)
    if skipped:
        found.append(Tile("Skipped", text.number(skipped), "estimates"))
    return found


def basis(run: Run) -> str:
    """What the key figures rest on, and how far chance alone moves the metric if it is a share of the examples."""
    if run.summary is None:
        return "The run has not finished: these are the figures of its log so far, the metric on the dev split."
    sentence, count, step = measured(run, "validation"), _count(run, "validation"), run.summary.get("best_step")
    if count and run.metric in COUNTED:
        sentence += f", standard error at most {50 / math.sqrt(count):.1f} points"
    return f"{sentence}. The model kept is that of step {step}, the best on the dev split." if step else f"{sentence}."


def measured(run: Run, split: str) -> str:
    """The metric and the split it is measured on."""
    name, count = text.words(run.metric or "").capitalize(), _count(run, split)
    return f"{name} on {text.number(count)} {split} examples" if count else f"{name} on the {split} split"


def _count(run: Run, split: str) -> int | None:
    return run.results.get("examples", {}).get(split)


def _method_title(name: Any) -> str:
    from zoft.optim import METHODS

    return getattr(METHODS.get(name), "__name__", str(name).upper())  # a preset of another method has no name


def _task_title(name: Any) -> str:
    from zoft.data import load_task, task_names

    return load_task(name).title if name in task_names() else Path(str(name)).name
