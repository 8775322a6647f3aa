"""``zoft report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="A run folder of *zoft train*.")]) -> None:
    """Write report.html of a run, finished or not, again from its files."""
    from zoft.report import write_report

    print(write_report(run))
