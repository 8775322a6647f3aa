"""Processes forked from one that has imported zoft, which takes each one seconds otherwise."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

WAY = "forkserver"
multiprocessing.set_forkserver_preload(["zoft.cli", "zoft.train.assemble"])


def spawn(function: Callable[..., None], arguments: tuple[Any, ...], nprocs: int) -> None:
    """Call `function` with a rank and `arguments` in `nprocs` processes, and wait for them; one's error is raised."""
    start_processes(function, arguments, nprocs, start_method=WAY)
