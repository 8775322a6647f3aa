"""``zoft methods``."""

from __future__ import annotations

from typing import Any

from zoft.cli import common


def methods(as_json: common.Json = False) -> None:
    """List the zeroth-order methods: where each stands on the three axes, and its defaults."""
    found = _describe()
    if as_json:
        common.print_json(found)
        return
    from rich.table import Table

    table = Table("method", *next(iter(found.values())), box=None)
    for name, facts in found.items():
        table.add_row(name, *map(str, facts.values()))
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
