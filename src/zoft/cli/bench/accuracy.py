"""``zoft bench accuracy``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoft.cli import common
from zoft.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def accuracy(
    suite: Annotated[Path, typer.Argument(help="YAML file that says what to run; see docs/benchmarks.md.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. Default: results/NAME beside SUITE, as NAME.yaml.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run only what matches, as TASK/METHOD: `sst2/*`, or `*/agzo`. Give it again for more."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder that holds, for each task, a folder of its rows. Default: the hub.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing: table and curves of what is there.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: common.Json = False,
) -> None:
    """Compare methods on tasks at equal cost: search each one's learning rate, run its seeds, and tabulate.

    What has been run is not run again: stop it when you like, and go on with the same command, several at once too.

    zoft bench accuracy benchmarks/smoke.yaml --data DATA
    """
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    from zoft.bench.accuracy import Results, run_suite
    from zoft.bench.suite import load_suite
    from zoft.bench.table import sheets, write_tables

    console = common.console(quiet=as_json)
    results = Results(load_suite(suite), out or suite.parent / "results" / suite.stem)
    if not report_only:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the run under way, too
        try:
            run_suite(results, data, only or ["*"], console)
        except KeyboardInterrupt:
            print("zoft: interrupted; the same command goes on from here", file=sys.stderr)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    found = write_tables(results)
    if as_json:
        common.print_json(found)
    elif markdown:
        print("\n".join(sheet.markdown() for sheet in sheets(found)), end="")
    else:
        for sheet in sheets(found):
            _print(console, sheet)
        console.print(f"tables, curves and runs: {results.out}")


def _print(console: Console, sheet: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text(sheet.title))
    for part in sheet.parts(console.width):
        table = Table(*part.columns, box=None)
        for cells in part.rows:
            table.add_row(*map(Text, cells))
        console.print(table)
