"""``zoft bench memory``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoft.cli import common
from zoft.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

METHODS = "agzo,zo-act,guided,lozo,mezo,fo-sgd,fo-adamw,lora"

Texts = Annotated[bool, typer.Option("--texts", help="Learn all the random tokens, not a label word after them.")]


def memory(
    model: common.Model,
    methods: Annotated[
        str,
        typer.Option(
            help="Names, separated by commas; see *zoft methods*. mezo-published, too. With options: agzo+rank=4."
        ),
    ] = METHODS,
    lengths: Annotated[str, typer.Option(help="Tokens of an example, separated by commas.")] = "128,512,2048",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in the batch.")] = 1,
    texts: Texts = False,
    plot: Annotated[Path | None, typer.Option(help="Save a plot here (.png, .svg or .pdf).")] = None,
    dtype: common.Dtype = None,
    compute_dtype: common.ComputeDtype = None,
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """Measure each method's peak memory against plain inference on the same batch, every point in its own process.

    Of an adapter, the model that it adds to is taken.

    zoft bench memory demo --methods agzo,fo-adamw --plot memory.png
    """
    common.require_plot(plot)
    sizes = [_length(length) for length in common.parse_names(lengths)]
    if not sizes:
        raise UserError("--lengths names no length")
    from zoft.bench.memory import compare, with_checkpointing
    from zoft.train.config import ComputeDtype
    from zoft.train.values import as_type

    arithmetic = as_type("compute_dtype", compute_dtype or "auto", ComputeDtype)
    rows, console = with_checkpointing(parse_methods(methods)), common.console(quiet=as_json)
    with console.status("") as status:
        records = compare(model, rows, sizes, batch_size, dtype or "auto", arithmetic, device, status.update, texts)
    if plot is not None:
        _plot(plot, records)
    if as_json:
        asked = {"model": model, "batch_size": batch_size, "texts": texts, "dtype": dtype or "auto"}
        asked |= {"compute_dtype": arithmetic}
        common.print_json(asked | {"points": records})
        return
    console.print(_table(records))
    print_failures(console, records)
    if plot is not None:
        console.print(f"plot: {plot}")


def parse_methods(text: str) -> list[str]:
    """The methods named in ``a, b``. Raises UserError if there are none, or one or an option of it is unknown."""
    from zoft.bench.step import PUBLISHED, with_options
    from zoft.train.optimizers import method_options, require_method

    names = common.parse_names(text)
    if not names:
        raise UserError(f"{text!r} names no method")
    for name in names:
        if name != PUBLISHED:
            method, options = with_options(name)
            require_method(method)
            method_options(method, options)
    return names


def print_failures(console: Console, records: list[dict[str, Any]]) -> None:
    """Say what the figures lack, if anything."""
    if not all(record.get("peak_reset", True) for record in records):
        console.print("this system cannot reset a process's peak: what loading the model took is in every figure")
    for record in records:
        if record["failed"]:
            console.print(f"{record['method']} at length {record['length']} failed: {record['failed']}")


def memory_point(point: str) -> None:
    """One point of `zoft bench memory`, a JSON object of `zoft.bench.memory.Point`'s fields, in this process."""
    from zoft.bench.memory import Point

    common.console(quiet=True)
    common.print_json(Point(**json.loads(point)).measure())


def _length(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise UserError(f"--lengths takes whole numbers above 0, separated by commas, not {text!r}")
    return int(text)


def _table(records: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    from zoft.report.text import size

    table = Table("length", "method", "peak", "to inference", "above the model", "to inference", box=None)
    for record in records:
        cells = [str(record["length"]), record["method"]]
        for figure, ratio in (("peak_memory_bytes", "ratio"), ("above_baseline_bytes", "ratio_above_baseline")):
            cells.append("failed" if record["failed"] else size(record[figure]))
            cells.append("–" if record[ratio] is None else f"{record[ratio]:.3f}")
        table.add_row(*cells)
    return table


def _plot(path: Path, records: list[dict[str, Any]]) -> None:
    from zoft.report.plots import save_lines

    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        points = lines.setdefault(record["method"], [])
        if not record["failed"]:
            points.append((record["length"], record["peak_memory_bytes"] / 2**30))
    save_lines(path, lines, "tokens of an example", "peak memory, GiB", columns=3)
