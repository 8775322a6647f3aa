"""One run of several processes, as torchrun and accelerate start them: the first writes, and all agree.

Every process must see the run folder. One process alone is its own first, and agrees with itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from zoft.errors import UserError
from zoft.optim.ranks import Ranks
from zoft.train.checkpoints import alone

LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "nccl")


def join(device: torch.device) -> bool:
    """Join the other processes, if there are any; whether this one is the first.

    Raises:
        UserError: the environment speaks of others, and does not say where they are.
    """
    try:
        return bool(PartialState(cpu=device.type == "cpu").is_main_process)
    except ValueError as error:
        raise UserError(f"{error}. Start several processes by torchrun; for one, unset WORLD_SIZE") from error


def wait() -> None:
    """Go on when all have come here."""
    PartialState().wait_for_everyone()


def one_after_the_first() -> AbstractContextManager[None]:
    """A block that the first process of each machine leaves before the others enter it."""
    return PartialState().local_main_process_first()


def agreed(value: Any) -> Any:
    """The first process's `value`, on all."""
    return broadcast_object_list([value])[0] if Ranks().count > 1 else value


def require_agreed(values: dict[str, Any]) -> None:
    """Raises UserError if a process has other `values` than another; the message gives the first name that differs."""
    everyone = gather_object([values]) if Ranks().count > 1 else [values]
    for name, value in values.items():
        if any(other[name] != value for other in everyone):
            raise UserError(f"the processes of this run differ in {name}: start all with the same files and settings")


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold the run folder `out`, as all processes together.

    Raises:
        UserError: somebody else holds it, or one of the processes has died.
    """
    try:
        with alone(out) if PartialState().is_main_process else nullcontext():
            wait()
            yield
            wait()
    except (ConnectionError, RuntimeError) as error:
        if Ranks().count == 1 or not _is_lost(error):
            raise
        raise UserError(
            f"{out}: another process of this run has ended; what was saved is whole, and any number of processes "
            f"can go on from it with zoft train --resume {out}"
        ) from error
    finally:
        PartialState().destroy_process_group()  # whose threads would not let the process end in order


def _is_lost(error: Exception) -> bool:
    """Whether a collective failed because another process is gone: to its backend only the words tell."""
    return isinstance(error, ConnectionError) or any(word in str(error).lower() for word in LOST)
