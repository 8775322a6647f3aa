"""``zoft export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from zoft.cli import common


def export(
    model: Annotated[str, typer.Argument(help="A run of *zoft train*, or an adapter or model by folder or hub id.")],
    to: Annotated[Literal["merged", "peft", "gguf-lora"], typer.Option(help="What to make of it.")],
    out: Annotated[Path, typer.Option(help="The folder, or for gguf-lora the file, to write.")],
    base: Annotated[
        str | None, typer.Option(help="The model that full weights were trained from. Default: the run's.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of an adapter made of full weights.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of merged weights: auto (the base's), float32, ...")] = "auto",
    as_json: common.Json = False,
) -> None:
    """Make merged weights, a PEFT adapter or a LoRA file for llama.cpp of what a run has learned.

    zoft export runs/mine --to merged --out merged

    zoft export runs/mine --to gguf-lora --out mine.gguf
    """
    from zoft.train import export

    console = common.console(quiet=as_json)
    if to == "merged":
        rounding = export.merge(model, out, dtype)
        result = {"to": to, "out": str(out), "rounding": rounding}
        console.print(f"{out}: rounding has cost {rounding:.1%} of the update" if rounding else f"{out}")
    else:
        found = export.learned(model, base, rank)
        (export.to_peft if to == "peft" else export.to_gguf)(found, out)
        result = {"to": to, "out": str(out), "energy": found.energy, "left_out": found.left_out}
        console.print(f"{out}: {len(found.factors)} layers, {found.energy:.1%} of the energy of their change")
        if found.left_out:
            console.print(f"left out: {len(found.left_out)} changed parameters such as {found.left_out[0]}")
    if as_json:
        common.print_json(result)
