"""``zoft eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoft.cli import common
from zoft.errors import UserError


def evaluate(
    model: common.Model,
    task: common.TaskName = None,
    data: common.Data = None,
    shots: Annotated[int, typer.Option(min=0, help="Training rows shown with their answers before each prompt.")] = 0,
    examples: Annotated[int | None, typer.Option(min=1, help="Validation rows. Default: all.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples in a batch.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of shots.")] = 0,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens of an example.")] = None,
    max_new_tokens: common.MaxNewTokens = None,
    template: common.Template = None,
    words: common.Words = None,
    label: common.Label = None,
    metric: common.Metric = None,
    dtype: common.Dtype = None,
    compute_dtype: common.ComputeDtype = None,
    device: common.Device = None,
    memory: common.Memory = None,
    as_json: common.Json = False,
) -> None:
    """Measure MODEL on a task's validation rows, zero-shot or with examples in the prompt.

    For a run of *zoft train*, task, data and precision are the run's where no flag says otherwise. A metric that is a
    function in a file has to be named by --metric: nothing is run because a folder says so.

    zoft eval demo --task sst2 --shots 4

    zoft eval runs/sst2
    """
    from zoft.data import is_reward
    from zoft.train import TrainConfig
    from zoft.train.evaluate import evaluate as run

    settings = Path(model) / "config.yaml"
    config = TrainConfig.load(
        settings if settings.is_file() else None,
        model=model,
        task=task,
        data=str(data) if data else None,
        eval_examples=examples,
        eval_batch_size=batch_size,
        seed=seed,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        template=template,
        words=words,
        label=label,
        metric=metric,
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        memory=memory,
    )
    unnamed = {name for name in (config.objective, config.metric) if name and is_reward(name)} - {metric}
    if settings.is_file() and unnamed:
        raise UserError(f"{settings} names code to run, {min(unnamed)}: to run it, add --metric {min(unnamed)}")
    console = common.console(quiet=as_json)
    result = run(config, shots)
    if as_json:
        common.print_json(result)
        return
    name = result["metric"]
    console.print(
        f"{result['task']}, {shots} shots: {name} {result[name]:.4f} on {result['examples']} rows "
        f"in {result['seconds']:.1f} s" + (f" ({result['truncated']} shortened)" if result["truncated"] else "")
    )
