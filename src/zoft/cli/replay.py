"""``zoft replay``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoft.cli import common
from zoft.errors import UserError


def replay(
    run: Annotated[Path, typer.Argument(help="The folder of a run by mezo, lozo, lozo-m or zo-act.")],
    to_step: Annotated[int | None, typer.Option(help="The steps to take. Default: all that are logged.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make. Default: replayed-N in the run.")] = None,
    as_json: common.Json = False,
) -> None:
    """Rebuild a run's model from the model it began with and its log: no data, no forward pass.

    zoft replay runs/mine --to-step 100
    """
    if to_step is not None and to_step < 0:
        raise UserError(f"--to-step must be at least 0, not {to_step}")
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} holds no run: it has no config.yaml")
    console = common.console(quiet=as_json)

    from zoft.train.replay import rebuild

    found = rebuild(run, to_step, out)
    if as_json:
        common.print_json(found)
        return
    if found["torn"]:
        console.print(f"the log's last {found['torn']} bytes are torn: an interrupted write", style="yellow")
    console.print(f"{found['steps']} steps in {found['seconds']} s: {found['out']}")
