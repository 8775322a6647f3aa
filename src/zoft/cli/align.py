"""``zoft align``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoft.cli import common
from zoft.errors import UserError
from zoft.options import parse_options

if TYPE_CHECKING:
    from rich.console import Console

    from zoft.bench import Alignment


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
        typer.Option("--option", "-o", help="An option of the methods that have it, such as -o rank=4. Repeatable."),
    ] = None,
    eps: Annotated[float | None, typer.Option(help="Distance of a probe. Default: each method's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the batches and the noise.")] = 0,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="The cosine of every layer, too.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Save a plot here (.png, .svg or .pdf), with --per-layer a second one beside it."),
    ] = None,
    template: common.Template = None,
    words: common.Words = None,
    label: common.Label = None,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """Measure the cosine between each method's estimate and the true gradient of the linear layers.

    An adapter is added to the weights first.

    zoft align demo --task sst2 --methods agzo,mezo --plot cosine.png
    """
    common.require_plot(plot)
    from zoft.bench import align as run
    from zoft.data import load_rows, sample
    from zoft.train import TrainConfig, load_model, task_batches, task_closures
    from zoft.train.export import merged

    options = parse_options(option or [])
    chosen = _methods(methods, options, {"seed": seed, "lr": 0.0} | ({"eps": eps} if eps is not None else {}))
    config = TrainConfig.load(
        None,
        model=model,
        task=task,
        data=str(data) if data else None,
        template=template,
        words=words,
        label=label,
        dtype=dtype,
        device=device,
    )
    console, description = common.console(quiet=as_json), config.load_task()
    rows = sample(load_rows(description, config.data, "train"), batches * batch_size, seed)
    if len(rows) < batches * batch_size:
        raise UserError(f"{batches} batches of {batch_size} need {batches * batch_size} rows; there are {len(rows)}")
    loaded, tokenizer = load_model(model, **config.loading)
    network, _ = merged(loaded)
    closures = task_closures(network, task_batches(network, tokenizer, description, rows, batch_size))
    with console.status("") as status:
        try:
            found = run(network, closures, chosen, estimates, lambda message: status.update(message))
        except ValueError as error:
            raise UserError(str(error)) from error

    result = {name: alignment.summary() for name, alignment in found.items()}
    layers = _layers(found) if per_layer else {}
    if plot is not None:
        from zoft.report.plots import save_comparison, save_lines

        save_comparison(plot, [{"method": name, **facts} for name, facts in result.items()], title=description.title)
        if per_layer:
            lines = {name: [*enumerate(cosines.values())] for name, cosines in layers.items()}
            save_lines(plot.with_stem(f"{plot.stem}-layers"), lines, "layer", "cosine to the true gradient")
    if as_json:
        facts = {"model": model, "task": description.name, "batch_size": batch_size, "batches": batches, "seed": seed}
        common.print_json(facts | {"methods": result} | ({"layers": layers} if per_layer else {}))
        return
    _print(console, result, layers)
    if plot is not None:
        console.print(f"plot: {plot}")


def _methods(names: str, options: dict[str, Any], settings: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """A maker of an optimizer for each method, with those of `options` that it has."""
    from zoft.train.optimizers import FIRST_ORDER, method_options, require_method, zero_order

    known: dict[str, dict[str, Any]] = {}
    for name in common.parse_names(names):
        require_method(name)
        if name in FIRST_ORDER:
            raise UserError(f"{name} is first-order: its estimate is the gradient itself")
        known[name] = method_options(name, {})
    if not known:
        raise UserError("--methods names no method")
    stray = {option: value for option, value in options.items() if not any(option in own for own in known.values())}
    method_options(next(iter(known)), stray)  # says what is wrong, if any is stray
    return {
        name: partial(
            zero_order,
            name,
            options=method_options(name, {o: v for o, v in options.items() if o in own}) | settings,
        )
        for name, own in known.items()
    }


def _layers(found: dict[str, Alignment]) -> dict[str, dict[str, float]]:
    """The mean cosine of every layer, by method."""
    return {
        name: {layer: sum(values) / len(values) for layer, values in alignment.layers.items()}
        for name, alignment in found.items()
    }


def _print(console: Console, result: dict[str, dict[str, Any]], layers: dict[str, dict[str, float]]) -> None:
    from rich.table import Table

    table = Table("method", "cosine", "± s.e.", "predicted", "capture", "estimates", "forwards", box=None)
    for name, facts in result.items():
        numbers = (f"{facts[key]:.3g}" for key in ("cosine_mean", "cosine_sem", "predicted_cosine", "capture"))
        table.add_row(name, *numbers, str(facts["estimates"]), str(facts["forwards"]))
    console.print(table)
    if layers:
        table = Table("layer", *layers, box=None)
        for layer in next(iter(layers.values())):
            table.add_row(layer, *(f"{values[layer]:.3g}" for values in layers.values()))
        console.print(table)
