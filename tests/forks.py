"""Processes forked from one that has imported zoft, which would take each of them seconds."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.multiprocessing import start_processes

from zoft.cli import main

WAY = "forkserver"
multiprocessing.set_forkserver_preload(["zoft.cli", "zoft.train.assemble"])


def spawn(function: Callable[..., None], arguments: tuple[Any, ...], nprocs: int) -> None:
    """Call `function` with a rank and `arguments` in `nprocs` processes, and wait for them; one's error is raised."""
    start_processes(function, arguments, nprocs, start_method=WAY)


class Command:
    """``zoft`` with `arguments`, after a call of `before`; what it says goes to files in `folder`."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.said = [folder / "out", folder / "err"]
        folder.mkdir()
        given = (arguments, dict(environment), self.said, before)
        self.process: BaseProcess = multiprocessing.get_context(WAY).Process(target=_command, args=given)
        self.process.start()

    def ended(self) -> tuple[int, str, str]:
        """Its exit code, and what it has said on standard output and on standard error."""
        self.process.join(timeout=120)
        assert self.process.exitcode is not None
        out, err = (path.read_text() for path in self.said)
        return self.process.exitcode, out, err


def _command(
    arguments: Sequence[str], environment: dict[str, str], said: list[Path], before: Callable[[], None] | None
) -> None:
    os.environ |= environment
    for stream, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    if before is not None:
        before()
    sys.argv = ["zoft", *arguments]
    main()


def ended(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What `zoft.bench.process` does of this name, for a `command` ``python -m zoft ...``."""
    with tempfile.TemporaryDirectory() as name:
        return subprocess.CompletedProcess(command, *Command(command[3:], environment, Path(name) / "said").ended())
