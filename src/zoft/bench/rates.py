"""The search for a learning rate, the same for every method: in half-decades, 1e-5, 3e-5, 1e-4, 3e-4, ..."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoft.errors import UserError


def search(first: str, dev: Callable[[str], Any], most: int) -> tuple[dict[str, Any], str | None]:
    """The learning rate with the highest `dev`, around `first`, which is neither the lowest nor the highest one tried.

    Rates are tried below and above the first, and then further as long as the best is at an end, until there are
    `most`. `dev` is None where a rate has not been tried yet. Returns what `dev` said of every rate wanted so far, in
    rising order, and the best rate; None for it while one is missing.
    """
    low, high = grid_index(first) - 1, grid_index(first) + 1
    while True:
        tried = {_rate(index): dev(_rate(index)) for index in range(low, high + 1)}
        if None in tried.values():
            return tried, None
        best = max(tried, key=lambda rate: tried[rate])
        place = grid_index(best)
        if low < place < high or len(tried) >= most:
            return tried, best
        low, high = min(low, place - 1), max(high, place + 1)


def grid_index(rate: str) -> int:
    """The place of a rate among the half-decades, 1 being at 0. Raises UserError if it is none of them."""
    mantissa, exponent = rate.split("e")
    if mantissa not in ("1", "3"):
        raise UserError(
            f"lr {rate}: a search begins at 1 or 3 times a power of ten; or leave it out with search: false"
        )
    return 2 * int(exponent) + (mantissa == "3")


def rate_name(lr: float) -> str:
    """A learning rate as the suite writes it: 1e-4."""
    mantissa, exponent = f"{lr:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _rate(index: int) -> str:
    return f"{(1, 3)[index % 2]}e{index // 2}"
