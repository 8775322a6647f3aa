"""``zoft demo``."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer

from zoft.cli import common

SETTINGS: dict[str, Any] = {
    "task": "squad",
    "steps": 250,
    "batch_size": 8,
    "dev_examples": 80,
    "eval_steps": 50,
    "eval_batch_size": 32,
}
RATES = {"agzo": 3e-5}  # found by trying: at ten times this learning rate the loss of whole answers diverges


def demo(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or the word *demo*.")] = "demo",
    method: Annotated[str, typer.Option(help="One of *zoft methods*, or auto.")] = "agzo",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the method.")] = SETTINGS["steps"],
    out: common.Out = None,
    as_json: common.Json = False,
) -> None:
    """Watch a small language model learn to answer questions, by forward passes only.

    Trains SmolLM2-135M-Instruct with AGZO on a bundled sample of SQuAD, in 8 to 15 minutes on two cores. With --method
    auto, by what zoft train does without a method.
    """
    from zoft.train import TrainConfig
    from zoft.train import train as run
    from zoft.train.files import free_folder, read_json

    console, out = common.console(quiet=as_json), out or free_folder(Path("runs/demo"))
    with as_file(files("zoft.demo") / "squad") as data:
        given = {"model": model, "method": method, "lr": RATES.get(method), "steps": steps}
        given |= {"data": str(data), "out": str(out)}
        summary = run(TrainConfig.load(None, **SETTINGS | given), console)
    if as_json:
        common.print_json(summary)
        return
    for example in read_json(out / "examples.json"):
        question = example["prompt"].split("Question:")[1].split("\n")[0].strip()
        console.print(f"\n{question}", style="bold")
        for moment in ("before", "after", "answer"):
            console.print(f"  {moment + ':':8}", " ".join(example[moment].split())[:90] or "(nothing)")
    console.print()
    common.print_summary(console, summary, out)
