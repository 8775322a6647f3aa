"""Options that several commands share, and what they print on."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoft.errors import UserError
from zoft.numbers import finite

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[
    str, typer.Argument(help="Hub id, folder, run, .gguf file, or the word *demo* (SmolLM2-135M-Instruct).")
]
TaskName = Annotated[str | None, typer.Option("--task", help="A built-in task; see *zoft tasks*.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder with train.jsonl and validation.jsonl, one such file (.jsonl, .json, .csv, .parquet), or a "
        "data set of the hub, owner/name. Default: the task's, from the hub."
    ),
]
Template = Annotated[str | None, typer.Option(help='Your own task: the prompt, such as "{text} It was".')]
Words = Annotated[str | None, typer.Option(help="Your own task: label words, such as 0=terrible,1=great.")]
Label = Annotated[str | None, typer.Option(help="Your own task: the column of the label, or of the completion.")]
Metric = Annotated[
    str | None,
    typer.Option(
        help="Your own task: accuracy, matthews, exact_match, f1, number_match, likelihood, FILE.py:FUNCTION."
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Tokens of a generated answer. Default: the task's, or 128.")]


def _folder(name: str) -> Path:
    if not name:  # which would be the folder one is in
        raise UserError("--out is empty: name a folder, or leave it out")
    return Path(name)


Out = Annotated[
    Path | None, typer.Option(parser=_folder, metavar="PATH", help="The run folder. Default: a new one in runs/.")
]
Dtype = Annotated[str | None, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16, or int8, nf4.")]
ComputeDtype = Annotated[
    str | None,
    typer.Option(help="What half-precision weights multiply in: weights (as they are), float32, or auto: the quicker."),
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0. Default: the accelerator, if there is one.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="A larger model: so much of the weights stays on the device, such as 4GiB, or auto; the rest is offloaded."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def console(quiet: bool) -> Console:
    """A console for people: silent if the output is JSON. Keeps other libraries from talking over it.

    What is in brackets is text, not markup, and in a file or a pipe lines are as long as they are.
    """
    from logging import ERROR, getLogger

    from rich.console import Console
    from transformers.utils import logging

    logging.set_verbosity_error()
    getLogger("accelerate").setLevel(ERROR)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    return Console(quiet=quiet, highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())


def print_summary(console: Console, summary: dict[str, Any], out: Path) -> None:
    """What a run came to, in words, and where it lies."""
    from rich.markup import escape

    metrics = summary["metrics"].items()
    changes = (f"{escape(name)} [bold]{old:.3f} -> {new:.3f}[/]" for name, (old, new) in metrics)
    console.print(
        f"{', '.join(changes)} on {summary['examples']['validation']} validation rows, after "
        f"{summary['forwards']} forwards in {summary['seconds']:.0f} s "
        f"({summary['peak_memory_bytes'] / 2**30:.1f} GiB at most)",
        markup=True,
    )
    for kind in ("model", "adapter"):
        if (out / kind).is_dir():
            console.print(f"{kind}: {out / kind}")
    console.print(f"report: {out / 'report.html'}")


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output; null for numbers that JSON does not have."""
    json.dump(finite(value), sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")


def parse_names(text: str) -> list[str]:
    """The names in ``a, b``, each once. A comma within brackets belongs to the name."""
    names, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            names.append("")
        else:
            names[-1] += letter
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def require_plot(path: Path | None) -> None:
    """Raises UserError if a plot cannot be saved there."""
    if path is not None and not (path.parent.is_dir() and path.suffix in (".png", ".svg", ".pdf")):
        raise UserError(f"cannot save a plot as {path}: give a .png, .svg or .pdf file in a folder that exists")
