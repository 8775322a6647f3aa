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

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run, finished or not: `summary` is None until it is."""

    folder: Path
    config: Record
    training: list[Record]
    evaluations: list[Record]
    summary: Record | None
    examples: list[Record]

    @cached_property
    def metric(self) -> str | None:
        """The name of the task's metric: the summary's, or else the first that was logged."""
        if self.summary and self.summary.get("metric"):
            return str(self.summary["metric"])
        logged = (key for line in self.evaluations for key in line if key.startswith("eval_"))
        return next((key[5:] for key in logged if key not in ("eval_loss", "eval_examples")), None)

    @cached_property
    def results(self) -> Record:
        """The summary, or as much of it as the configuration and the log so far tell."""
        if self.summary is not None:
            return self.summary
        results = {key: self.config.get(key) for key in ("task", "model", "method", "seed")}
        lines = sorted(self.training + self.evaluations, key=lambda line: line["step"])
        for key in ("step", "forwards", "seconds", "skipped", "zero"):
            results[key] = next((line[key] for line in reversed(lines) if key in line), None)
        results["steps"] = results.pop("step")
        if results["steps"] and results["seconds"]:
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
