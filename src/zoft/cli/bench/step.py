"""``zoft bench step``."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoft.cli import common
from zoft.cli.bench.memory import Texts, parse_methods, print_failures
from zoft.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

LENGTH = 32


def step(
    model: common.Model,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Names, separated by commas, or repeatable; mezo-published, fo-sgd and fo-adamw, too. With options: "
            "agzo+rank=4."
        ),
    ] = None,
    task: common.TaskName = None,
    data: common.Data = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in the batch.")] = 16,
    length: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens of an example, random ones, without --task. Default: {LENGTH}.")
    ] = None,
    texts: Texts = False,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds over which medians are taken.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the batch.")] = 0,
    dtype: common.Dtype = None,
    compute_dtype: common.ComputeDtype = None,
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """Time each method's step against two plain forwards of the same batch, in turns and in one process.

    And measure its peak memory, as zoft bench memory does. Of an adapter, the model that it adds to is taken.

    zoft bench step demo --method agzo,mezo-published
    """
    if task is not None and (length is not None or texts):
        raise UserError("--length and --texts are for random tokens: leave them out, or leave out --task")
    if data is not None and task is None:
        raise UserError("--data needs --task NAME (see zoft tasks)")
    import torch

    from zoft.bench.memory import compare
    from zoft.bench.step import time_steps, with_options
    from zoft.train import load_model
    from zoft.train.adapter import without
    from zoft.train.arithmetic import settle_arithmetic
    from zoft.train.config import ComputeDtype
    from zoft.train.values import as_type

    names = parse_methods(",".join(method or ["agzo"]))
    arithmetic = as_type("compute_dtype", compute_dtype or "auto", ComputeDtype)
    if "lora" in (with_options(name)[0] for name in names):
        raise UserError("lora changes the model that all methods share here; zoft bench memory has it")
    console = common.console(quiet=as_json)
    loaded, tokenizer = load_model(model, dtype=dtype or "auto", device=device)
    network = without(loaded)
    computed = settle_arithmetic(network, arithmetic)
    batch = _batch(network, tokenizer, task, data, batch_size, length or LENGTH, seed, texts)
    facts = {"model": model, "task": task, "batch_size": batch_size, "length": batch["input_ids"].shape[1]}
    facts |= {"texts": texts}
    facts |= {"repeats": repeats, "dtype": str(network.dtype).removeprefix("torch."), "compute_dtype": computed}
    facts |= {"device": str(network.device), "threads": torch.get_num_threads()}
    with console.status("") as status:
        found = time_steps(names, network, batch, repeats, status.update)
        del network, batch  # room for the processes that measure memory
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()
        precision = dtype or "auto", computed
        records = compare(model, names, [facts["length"]], batch_size, *precision, device, status.update, texts)
    plain, *others = [record.get("peak_memory_bytes") for record in records]  # None where a process failed
    for name, peak in zip(names, others, strict=True):
        found[name] |= {"peak_memory_bytes": peak, "inference_peak_memory_bytes": plain}
    if as_json:
        common.print_json(facts | ({"method": names[0], **found[names[0]]} if len(names) == 1 else {"methods": found}))
        return
    _print(console, found)
    print_failures(console, records)


def _batch(
    model: Any, tokenizer: Any, task: str | None, data: Path | None, size: int, length: int, seed: int, texts: bool
) -> Any:
    """One training batch of the task, or a random one."""
    from zoft.data import load_rows, load_task, sample
    from zoft.train import random_batch, task_batches

    if task is None:
        return random_batch(model, size, length, seed, texts)
    description = load_task(task)
    rows = sample(load_rows(description, data, "train"), size, seed)
    if len(rows) < size:
        raise UserError(f"a batch of {size} is more than the {len(rows)} training rows")
    return task_batches(model, tokenizer, description, rows, size)[0]


def _print(console: Console, result: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("method", "s/step", "ratio", "to its own", "forwards", "update", "rest", "peak", box=None)
    for name, facts in result.items():
        parts = facts["breakdown"]
        forwards = " + ".join(f"{seconds:.3f}" for seconds in parts["forwards"])
        table.add_row(
            name,
            f"{facts['seconds_per_step']:.3f}",
            f"{facts['ratio']:.2f}",
            f"{facts['ratio_own_forwards']:.2f}",
            f"{forwards}, back {parts['backward']:.3f}" if "backward" in parts else forwards,
            f"{parts['update']:.3f}" if "update" in parts else "",
            f"{parts['rest']:.3f}",
            _size(facts["peak_memory_bytes"]),
        )
    console.print(table)
    plain = next(iter(result.values()))
    peak = _size(plain["inference_peak_memory_bytes"])
    console.print(f"two plain forwards: {plain['seconds_two_forwards']:.3f} s, peak {peak}")


def _size(count: int | None) -> str:
    from zoft.report.text import size

    return "failed" if count is None else size(count)
