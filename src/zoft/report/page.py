"""The page about a run: one HTML file that needs nothing else."""

import json
import os
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoft.errors import UserError

from . import figures, plots, text
from .run import Record, Run, read_run

EXAMPLES_SHOWN = 6
COSTS = {
    "steps": "Steps",
    "examples_seen": "Examples seen",
    "examples": "Examples",
    "truncated": "Examples cut to fit",
    "skipped": "Skipped, the loss not finite",
    "zero": "Skipped, the loss unchanged",
    "zoft_version": "zoft",
}


def write_report(folder: str | Path) -> Path:
    """Write `report.html` about the run in `folder`, at any time during it or after, and return its path."""
    run = read_run(folder)
    path = run.folder / "report.html"
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(render(run), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def render(run: Run) -> str:
    """The page as text; the same for the same files."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    place = str(run.config.get("out") or run.folder.name)
    return template.render(
        headline=figures.headline(run),
        tiles=figures.tiles(run),
        basis=figures.basis(run),
        metric_curve=plots.metric_curve(run.evaluations, run.metric) if run.metric else "",
        metric_caption=figures.measured(run, "dev"),
        loss_curve=plots.loss_curve(run.training),
        examples=[_judged(example) for example in run.examples[:EXAMPLES_SHOWN]],
        config=_flat(run.config),
        costs=_costs(run),
        loading=_loading(run, place),
        command=shlex.join(["zoft", "train", "--config", f"{place}/config.yaml", "--out", f"{place}-again"]),
    )


def _costs(run: Run) -> dict[str, str]:
    """What the run used, beside the key figures."""
    found = {label: _plain(run.results[key]) for key, label in COSTS.items() if key in run.results}
    if run.results.get("steps"):
        found = {"Forwards a step": text.number(run.results["forwards"] / run.results["steps"])} | found
    return found


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return value if isinstance(value, str) else text.number(value)


def _flat(config: Record, prefix: str = "") -> dict[str, str]:
    """The configuration without nesting: the key of an inner value is its path."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def _judged(example: Record) -> Record:
    """The example, with what came out before and after each beside whether it is right, if that is known."""
    right = example.get("right", {})
    outputs = {when: (example[when], right.get(when)) for when in ("before", "after")}
    return {"prompt": example["prompt"], "answer": example["answer"], "outputs": outputs}


def _loading(run: Run, place: str) -> str:
    """Python that loads what was trained; empty if it is not there."""
    for name in ("model", "adapter"):
        folder, path = run.folder / name, f"{place}/{name}"
        if (folder / "adapter_config.json").is_file():
            loader = "AutoPeftModelForCausalLM"
            imports = f"from peft import {loader}\nfrom transformers import AutoTokenizer"
        elif (folder / "config.json").is_file():
            loader = "AutoModelForCausalLM"
            imports = f"from transformers import {loader}, AutoTokenizer"
        else:
            continue
        tokenizer = path if (folder / "tokenizer_config.json").is_file() else run.config.get("model")
        return (
            f"{imports}\n\n"
            f"model = {loader}.from_pretrained({json.dumps(path)})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(tokenizer)})"
        )
    return ""
