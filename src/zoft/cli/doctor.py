"""``zoft doctor``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoft.cli import common
from zoft.errors import UserError
from zoft.options import parse_options

if TYPE_CHECKING:
    from zoft.train.diagnosis import Diagnosis

RANKS = (1, 2, 4, 8, 16)


def doctor(
    model: common.Model,
    task: common.TaskName = None,
    data: common.Data = None,
    method: Annotated[str, typer.Option(help="A zeroth-order method with probes; see *zoft methods*.")] = "agzo",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="An option of the method, such as -o rank=4. Repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the run that is planned.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 16,
    directions: Annotated[int, typer.Option(min=2, help="Random directions tried; 30 forwards each.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the batches and the noise.")] = 0,
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Backpropagate once, too: which rank captures how much of the gradient.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Save a plot of the errors over eps.")] = None,
    template: common.Template = None,
    words: common.Words = None,
    label: common.Label = None,
    dtype: common.Dtype = None,
    compute_dtype: common.ComputeDtype = None,
    device: common.Device = None,
    memory: common.Memory = None,
    as_json: common.Json = False,
) -> None:
    """Measure, before training, which eps and lr suit a method on MODEL and task, and what the run will cost.

    zoft doctor demo --task sst2 --method agzo
    """
    import time

    from zoft.bench import captured_energy
    from zoft.data import load_rows, sample
    from zoft.report.plots import save_errors
    from zoft.train import TrainConfig, load_model, task_batches, task_closures
    from zoft.train.adapter import beside
    from zoft.train.arithmetic import settle_arithmetic
    from zoft.train.diagnosis import diagnose
    from zoft.train.memory import peak_memory_bytes
    from zoft.train.optimizers import to_train, zero_order_of

    common.require_plot(plot)
    config = TrainConfig.load(
        None,
        model=model,
        task=task,
        data=str(data) if data else None,
        method=method,
        method_options=parse_options(option or []),
        batch_size=batch_size,
        seed=seed,
        template=template,
        words=words,
        label=label,
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        memory=memory,
    )
    description, console = config.load_task(), common.console(quiet=as_json)
    rows = sample(load_rows(description, config.data, "train"), 8 * batch_size, seed)
    if len(rows) < 2 * batch_size:
        raise UserError(f"two batches of {batch_size} need {2 * batch_size} rows; there are {len(rows)}")
    loaded, tokenizer = load_model(model, **config.loading, trainable=True)
    settle_arithmetic(loaded, config.compute_dtype)
    network, adapter = to_train(method, loaded)
    closures = task_closures(network, task_batches(network, tokenizer, description, rows, batch_size))
    start = time.perf_counter()
    try:
        with console.status(f"probing {directions} directions"):
            make = partial(zero_order_of, config, adapter=adapter)
            found = diagnose(network, closures, make, directions)
            seconds = (time.perf_counter() - start) / found.forwards
            optimizer = make(network)
            optimizer.estimate(closures[0])  # what a step takes
            optimizer.branches.detach()
        forecast = {
            "seconds_per_forward": round(seconds, 4),
            "seconds": round(optimizer.counters.forwards * steps * seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(network.device),
        }
        energy = captured_energy(beside(network, adapter), closures[0], RANKS) if gradient else None
    except ValueError as error:
        raise UserError(f"method {method}: {error}") from error
    if plot is not None:
        save_errors(plot, found.distances, found.errors, f"{method} on {description.title}")
    if as_json:
        facts = {"model": model, "method": method, "steps": steps, **asdict(found), **forecast}
        common.print_json(facts | ({"captured_energy": energy} if energy else {}))
        return
    from rich.table import Table

    table = Table("eps", *(f"{distance:g}" for distance in found.distances), box=None)
    for sides, errors in found.errors.items():
        table.add_row(f"error, {sides}", *(f"{error:.2f}" for error in errors))
    console.print(table)
    for line in _advice(found, forecast, method, steps):
        console.print(line, markup=True)
    if energy is not None:
        shares = ", ".join(f"{share:.0%} at rank {rank}" for rank, share in energy.items())
        console.print(f"the activations' leading directions capture of the gradient's energy: {shares}")


def _advice(found: Diagnosis, forecast: dict[str, Any], method: str, steps: int) -> list[str]:
    from zoft.train.diagnosis import ENDURING

    error = min(found.errors["two-sided" if found.two_sided else "one-sided"])
    advice = [f"[bold]--eps {found.eps:.0e}[/]: there a difference is within {error:.0%} of the slope"]
    if error > 0.7:
        advice.append("the slope drowns at every eps: the loss is too coarse in this dtype, try --dtype float32")
    if found.agreement < 2 * ENDURING:
        advice.append("slopes of different batches hardly agree: larger batches, or more --directions to be sure of it")
    if found.lr is not None and found.largest_lr is not None:
        harm = f"; above {found.largest_lr:.0e} the first step does harm" if found.largest_lr > 0 else ""
        advice.append(
            f"[bold]--lr {found.lr:.0e}[/]: makes progress until batches share {ENDURING:.0%} of a squared slope "
            f"(now {found.agreement:.0%}){harm}"
        )
    else:
        advice.append("no lr to advise: the loss does not curve upwards along these directions")
    minutes = forecast["seconds"] / 60
    advice.append(
        f"{steps} steps of {method}: about {minutes:.1f} min without evaluation, "
        f"{forecast['peak_memory_bytes'] / 2**30:.1f} GiB at most"
    )
    return advice
