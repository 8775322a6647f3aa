"""``zoft align``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from zoft.cli import common
from zoft.errors import UserError


def align(
    model: common.Model,
    task: common.TaskName = None,
    data: common.Data = None,
    methods: Annotated[str, typer.Option(help="Names, separated by commas; see *zoft methods*.")] = "agzo,lozo,mezo",
    estimates: Annotated[int, typer.Option(min=2, help="Estimates of each method.")] = 30,
    batches: Annotated[int, typer.Option(min=1, help="Batches over which they are spread.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 16,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="An option of the methods, such as -o rank=4. Repeatable."),
    ] = None,
    eps: Annotated[float | None, typer.Option(help="Distance of a probe. Default: each method's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the batches and the noise.")] = 0,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="The cosine of every layer, too.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Save a plot here (.png or .svg).")] = None,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """Measure the cosine between each method's estimate and the true gradient of the linear layers.

    zoft align demo --task sst2 --methods agzo,mezo --plot cosine.png
    """
    if not task:
        raise UserError("nothing to align on: give --task NAME (see zoft tasks)")
    from zoft.bench import align as run
    from zoft.data import Collator, Encoder, TaskDataset, load_rows, load_task, losses, read_logits, sample
    from zoft.optim import METHODS
    from zoft.train.models import load_model, max_length
    from zoft.train.optimizers import FIRST_ORDER, method_options, require_method

    chosen = {}
    for name in (part.strip() for part in methods.split(",") if part.strip()):
        require_method(name)
        if name in FIRST_ORDER:
            raise UserError(f"{name} is first-order: its estimate is the gradient itself")
        settings = method_options(name, common.parse_options(option or []))
        settings |= {"seed": seed, "lr": 0.0} | ({"eps": eps} if eps is not None else {})
        chosen[name] = partial(METHODS[name], **settings)
    if not chosen:
        raise UserError("--methods names no method")

    console = common.console(quiet=as_json)
    description = load_task(task)
    network, tokenizer = load_model(model, dtype=dtype or "float32", device=device)
    rows = sample(load_rows(description, data, "train"), batches * batch_size, seed)
    if len(rows) < batches * batch_size:
        raise UserError(f"{batches} batches of {batch_size} need {batches * batch_size} rows; there are {len(rows)}")
    items = TaskDataset(rows, Encoder(tokenizer, description, max_length(network)))
    collate = Collator(tokenizer.pad_token_id, "train")
    groups = [
        {name: tensor.to(network.device) for name, tensor in collate([items[i + k] for k in range(batch_size)]).items()}
        for i in range(0, len(rows), batch_size)
    ]
    closures = [lambda batch=batch: losses(read_logits(network, batch), batch).mean() for batch in groups]
    with console.status("") as status:
        found = run(network, closures, chosen, estimates, lambda message: status.update(message))
    result = {name: alignment.summary() for name, alignment in found.items()}
    layers = {
        name: {layer: sum(values) / len(values) for layer, values in alignment.layers.items()}
        for name, alignment in found.items()
    }
    if plot is not None:
        from zoft.report.plots import save_comparison

        save_comparison(plot, [{"method": name, **facts} for name, facts in result.items()], title=description.title)
    if as_json:
        facts = {"model": model, "task": description.name, "batch_size": batch_size, "batches": batches, "seed": seed}
        common.print_json(facts | {"methods": result} | ({"layers": layers} if per_layer else {}))
        return
    from rich.table import Table

    table = Table("method", "cosine", "± s.e.", "predicted", "capture", "estimates", "forwards", box=None)
    for name, f in result.items():
        numbers = [f["cosine_mean"], f["cosine_sem"], f["predicted_cosine"], f["capture"]]
        table.add_row(name, *(f"{number:.3g}" for number in numbers), str(f["estimates"]), str(f["forwards"]))
    console.print(table)
    if per_layer:
        table = Table("layer", *layers, box=None)
        for layer in next(iter(layers.values())):
            table.add_row(layer, *(f"{values[layer]:.3g}" for values in layers.values()))
        console.print(table)
    if plot is not None:
        console.print(f"plot: {plot}")
