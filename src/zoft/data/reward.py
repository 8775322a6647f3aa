"""A metric of the user's own: a reward, a function with the signature of TRL's reward functions."""

import functools
import importlib
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from zoft.errors import UserError

from .task import Row

Reward = Callable[..., Sequence[float | None]]


def is_reward(name: str) -> bool:
    """Whether the metric `name` is a function of the user's: ``file.py:function`` or ``module:function``."""
    return ":" in name


@functools.cache
def load_reward(name: str) -> Reward:
    """The function that `name` names. Raises UserError if there is none, or its file cannot be run."""
    place, _, function = name.rpartition(":")
    with _explained(name):
        if Path(place).suffix == ".py":
            found = runpy.run_path(place).get(function)
        else:
            found = getattr(importlib.import_module(place), function, None)
    if not callable(found):
        raise UserError(f"reward {name}: {place} has no function {function!r}")
    return found


def rewards(name: str, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """The reward of each completion, higher for better: ``function(prompts=, completions=, **columns)``.

    Each column of the rows but `prompt` and `completion` is a list with one value for each of them. None, where the
    reward does not apply, counts as 0. Raises UserError for what goes wrong in the function, and for another number of
    rewards than completions.
    """
    columns = {column: [row.get(column) for row in rows] for column in rows[0].keys() - {"prompt", "completion"}}
    function = load_reward(name)
    with _explained(name):
        found = function(prompts=list(prompts), completions=list(completions), **columns)
        values = [0.0 if value is None else float(value) for value in found]
    if len(values) != len(completions):
        raise UserError(f"reward {name}: it gave {len(values)} rewards for {len(completions)} completions")
    return values


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What goes wrong in the user's code, in one line with its place. What it prints goes to standard error."""
    try:
        with redirect_stdout(sys.stderr):  # ``--json`` prints one object on standard output and nothing else
            yield
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}, line {place.lineno}"
        raise UserError(f"reward {name}: {type(error).__name__}: {error} ({where})") from error
