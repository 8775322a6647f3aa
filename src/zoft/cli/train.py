"""``zoft train``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from zoft.cli import common
from zoft.errors import UserError
from zoft.options import parse_options


def train(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hub id, folder, run or adapter to go on from, .gguf file, or the word *demo* (SmolLM2-135M-Instruct)."
        ),
    ] = None,
    task: common.TaskName = None,
    data: common.Data = None,
    objective: Annotated[
        str | None,
        typer.Option(help="What to train for: loss, a metric such as f1, or a reward, FILE.py:FUNCTION."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Answers drawn for a prompt, where generated text is measured and not probed. Default: 4."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="auto, one of *zoft methods*, or fo-sgd, fo-adamw, lora.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimizer. Default: 300.")] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rate, or auto: measure it. Default: the method's.")] = None,
    eps: Annotated[
        str | None,
        typer.Option(help="Distance of a probe (the papers' mu), or auto: measure it. Default: the method's."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An option of the method, such as -o rank=4. Repeatable.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a batch. Default: 16.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches in a step. Default: 1.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Of the learning rate: constant, linear, cosine, ...")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps over which the learning rate rises.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decoupled weight decay.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the data's order and all noise.")] = None,
    out: common.Out = None,
    train_examples: Annotated[int | None, typer.Option(help="Training rows. Default: as many as the run sees.")] = None,
    dev_examples: Annotated[
        int | None, typer.Option(help="Rows held out of train to choose the checkpoint, at most a fifth. Default: 200.")
    ] = None,
    eval_examples: Annotated[int | None, typer.Option(help="Validation rows. Default: all.")] = None,
    eval_steps: Annotated[
        int | None, typer.Option(help="Evaluate on the held-out rows every so many steps. Default: 50.")
    ] = None,
    eval_batch_size: Annotated[
        int | None, typer.Option(help="Examples in a batch of an evaluation. Default: 32.")
    ] = None,
    save_steps: Annotated[int | None, typer.Option(help="Checkpoint every so many steps, and keep the last.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of an example; what is longer loses its passage's end.")
    ] = None,
    max_new_tokens: common.MaxNewTokens = None,
    guard: Annotated[
        bool | None, typer.Option("--guard/--no-guard", help="If it diverges, go back, and on with a smaller lr.")
    ] = None,
    template: common.Template = None,
    words: common.Words = None,
    label: common.Label = None,
    metric: common.Metric = None,
    dtype: common.Dtype = None,
    compute_dtype: common.ComputeDtype = None,
    device: common.Device = None,
    memory: common.Memory = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; flags go over it.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    as_json: common.Json = False,
) -> None:
    """Train MODEL on a task, and leave the model, its metrics and a report in a run folder.

    zoft train demo --data my.jsonl

    zoft train Qwen/Qwen3-0.6B --task sst2 --method agzo --steps 300 --out runs/sst2
    """
    flags = {
        "model": model,
        "task": task,
        "data": str(data) if data else None,
        "objective": objective,
        "samples": samples,
        "method": method,
        "steps": steps,
        "lr": lr,
        "eps": eps,
        "method_options": parse_options(option or []),
        "batch_size": batch_size,
        "accumulate": accumulate,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "seed": seed,
        "out": str(out) if out else None,
        "train_examples": train_examples,
        "dev_examples": dev_examples,
        "eval_examples": eval_examples,
        "eval_steps": eval_steps,
        "eval_batch_size": eval_batch_size,
        "save_steps": save_steps,
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "guard": guard,
        "template": template,
        "words": words,
        "label": label,
        "metric": metric,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "device": device,
        "memory": memory,
    }
    if resume is not None:
        given = [name for name, value in flags.items() if value not in (None, {}) and name != "steps"]
        if given or config:
            raise UserError(f"--resume takes its settings from the run; leave out {', '.join(given) or '--config'}")
        if not (resume / "config.yaml").is_file():
            raise UserError(f"{resume} holds no run: it has no config.yaml")
        config, flags["out"] = resume / "config.yaml", str(resume)

    from zoft.train import TrainConfig
    from zoft.train import train as run

    settings = TrainConfig.load(config, **flags)
    console = common.console(quiet=as_json)
    first = int(os.environ.get("RANK", "0")) == 0  # of several processes
    try:
        summary = run(settings, console, resume=resume is not None)
    except KeyboardInterrupt as stopped:
        if first and (Path(settings.out) / "config.yaml").is_file():
            print(f"zoft: interrupted; continue with: zoft train --resume {settings.out}", file=sys.stderr)
        raise typer.Exit(128 + getattr(stopped, "signal", signal.SIGINT)) from None
    if as_json and first:
        common.print_json(summary)
    common.print_summary(console, summary, Path(settings.out))
