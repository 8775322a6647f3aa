"""``zoft tasks``."""

from __future__ import annotations

from zoft.cli import common


def tasks(as_json: common.Json = False) -> None:
    """List the built-in tasks."""
    from zoft.data import load_task, task_names

    found = [load_task(name) for name in task_names()]
    if as_json:
        common.print_json({t.name: {"title": t.title, "kind": t.kind, "metric": t.metric, "hub": t.hub} for t in found})
        return
    from rich.table import Table

    table = Table("task", "title", "kind", "metric", "hub", box=None)
    for task in found:
        hub = " ".join(part for part in task.hub or () if part)
        table.add_row(task.name, task.title, task.kind, task.metric, hub)
    common.console(quiet=False).print(table)
