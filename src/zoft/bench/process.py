"""``zoft`` as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from zoft.errors import UserError

MISTAKE = 2  # the exit code for what the user has to mend
STOPPED = {128 + number for number in (signal.SIGINT, signal.SIGTERM)}  # those of a run that was told to stop


def run_zoft(
    arguments: Sequence[str], name: str, environment: Mapping[str, str] | None = None
) -> tuple[str, str | None]:
    """What ``zoft`` with `arguments` says on standard output, and what ended it: None if nothing did.

    `environment` holds variables of its environment that differ from this process's.

    Raises:
        UserError: it refuses its arguments; the message begins with `name`.
        KeyboardInterrupt: it was told to stop.
    """
    found = _ended([sys.executable, "-m", "zoft", *arguments], os.environ | (environment or {}))
    if found.returncode in STOPPED:
        raise KeyboardInterrupt
    if found.returncode < 0:
        return found.stdout, f"ended by signal {-found.returncode}{', for lack of memory?' * (found.returncode == -9)}"
    last = (found.stderr.strip().splitlines() or [f"ended with code {found.returncode}"])[-1]
    if found.returncode == MISTAKE:
        raise UserError(f"{name}: {last.removeprefix('zoft: ')}")
    return found.stdout, last if found.returncode else None


def _ended(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`command` once it has ended; if this process has to end before, so has that one, with time for a checkpoint."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            out, err = process.communicate()
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):  # of which the terminal has told it, too
                process.terminate()
            process.communicate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
