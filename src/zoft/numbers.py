"""Numbers that are not finite, which JSON does not have."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """`value`, to be written as JSON, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_back(values: dict[str, float | None]) -> dict[str, float]:
    """Numbers that `finite` has gone over: None was not finite."""
    return {name: math.nan if value is None else value for name, value in values.items()}
