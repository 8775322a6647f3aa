"""``zoft bench``. One module a command."""

from __future__ import annotations

import typer

from zoft.cli.bench.accuracy import accuracy
from zoft.cli.bench.memory import memory, memory_point
from zoft.cli.bench.step import step

bench = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@bench.callback()
def about() -> None:
    """Measure methods against one another."""


bench.command()(accuracy)
bench.command()(step)
bench.command()(memory)
bench.command(name="memory-point", hidden=True)(memory_point)
