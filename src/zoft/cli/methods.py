"""``zoft methods``."""

from __future__ import annotations

from typing import Any

from zoft.cli import common


def methods(as_json: common.Json = False) -> None:
    """List the methods that need forward passes only: where each stands on the three axes, and its defaults."""
    found = _describe()
    if as_json:
        common.print_json(found)
        return
    from rich.table import Table

    rows = [
        ("method", *next(iter(found.values()))),
        *((name, *map(str, facts.values())) for name, facts in found.items()),
    ]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # as narrow as its words: 80 columns
    for header, *cells in zip(*rows, strict=True):
        table.add_column(header, min_width=max(map(len, " ".join((header, *cells)).split())))
    for row in rows[1:]:
        table.add_row(*row)
    common.console(quiet=False).print(table)


def _describe() -> dict[str, dict[str, Any]]:
    from torch import nn

    from zoft.optim import METHODS
    from zoft.train.optimizers import method_options

    described = {}
    for name, method in METHODS.items():
        optimizer = method(nn.Linear(2, 2))
        defaults = method_options(name, {})
        described[name] = {
            "subspace": str(optimizer.subspace),
            "estimator": str(optimizer.estimator),
            "update": str(optimizer.update),
            "others": optimizer.others,
            "lr": defaults["lr"],
            "eps": defaults.get("eps", ""),
            "paper": getattr(optimizer, "paper", ""),
        }
    return described
