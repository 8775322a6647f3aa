"""The files of a run folder, read back."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from zoft.errors import UserError
from zoft.numbers import read_back

Record = dict[str, Any]
METRICS = ("initial", "final", "best")  # of a summary, and not finite where the loss was not


@dataclass(frozen=True)
class Run:
    """A run, finished or not: `summary` is None until it is.

    The evaluations of the log are on the dev split, which chooses the model to keep; those of the summary are on the
    validation split.
    """

    folder: Path
    config: Record
    training: list[Record]
    evaluations: list[Record]
    summary: Record | None
    examples: list[Record]

    @cached_property
    def metric(self) -> str | None:
        """The name of the task's metric: the summary's, or else the first that was logged."""
        from zoft.data import is_reward
        from zoft.data.metrics import METRICS

        if self.summary is not None:
            return self.summary["metric"]
        logged = (key.removeprefix("eval_") for line in self.evaluations for key in line)
        return next((name for name in logged if name in METRICS or is_reward(name)), None)

    @cached_property
    def results(self) -> Record:
        """The summary, or as much of it as the configuration and the log so far tell."""
        if self.summary is not None:
            return self.summary | read_back({name: self.summary[name] for name in METRICS if name in self.summary})
        config = self.config
        results: Record = {"task": config.get("task") or config.get("data"), "model": config.get("model")}
        results["method"] = config.get("method")
        for line in sorted(self.training + self.evaluations, key=lambda line: line["step"]):
            results |= {key: line[key] for key in ("forwards", "seconds", "skipped", "zero") if key in line}
            results["steps"] = line["step"]
        if results.get("steps") and results.get("seconds"):
            results["seconds_per_step"] = results["seconds"] / results["steps"]
        _, values = series(self.evaluations, f"eval_{self.metric}")
        if values:
            results |= {"initial": values[0], "final": values[-1], "best": max(values)}
        return results


def read_run(folder: str | Path) -> Run:
    """The run in `folder`. Raises UserError if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no run folder {folder}; give the --out folder of a zoft train")
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise UserError(f"{folder} has no metrics.jsonl; give the --out folder of a zoft train")
    lines = _read_log(log)
    return Run(
        folder=folder,
        config=_read(folder / "config.yaml", yaml.safe_load) or {},
        training=_by_step(line for line in lines if "loss" in line),
        evaluations=_by_step(line for line in lines if any(key.startswith("eval_") for key in line)),
        summary=_read(folder / "summary.json", json.loads),
        examples=_read(folder / "examples.json", json.loads) or [],
    )


def series(lines: Iterable[Record], key: str) -> tuple[list[float], list[float]]:
    """Forwards and values of the lines that have a finite `key`."""
    points = [(line["forwards"], line[key]) for line in lines if line.get(key) is not None and math.isfinite(line[key])]
    return [x for x, _ in points], [y for _, y in points]


def _read_log(path: Path) -> list[Record]:
    """The log's lines, without those that a killed run has torn."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"step", "forwards"} <= line.keys():
            lines.append(line)
    return lines


def _by_step(lines: Iterable[Record]) -> list[Record]:
    """The lines in order; of a step that a resumed run has done again, the last."""
    latest = {line["step"]: line for line in lines}
    return [latest[step] for step in sorted(latest)]


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """The content of a file, or None if it is absent."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
