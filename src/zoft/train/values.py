"""Values as a user writes them, on the command line or in YAML, read as the type that a setting has."""

from __future__ import annotations

import types
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, Union, get_args, get_origin

from zoft.errors import UserError


def as_type(name: str, value: Any, hint: Any) -> Any:
    """`value`, if it is (or reads as) a `hint`: YAML reads 1e-4 as text, and one text stands for a list of one.

    `hint` is a plain type, a ``Literal``, a sequence of str, or a union of them and None; of several types, the first
    that fits.

    Raises:
        UserError: it does not; the message names the setting `name`.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    *others, kind = (k for k in kinds if k is not types.NoneType)
    for other in others:
        with suppress(UserError):
            return as_type(name, value, other)
    origin = get_origin(kind) or kind
    if origin is Literal:
        if value in get_args(kind):
            return value
        also = ["true or false" if other is bool else f"of type {other.__name__}" for other in others]
        choices = " or ".join((*also, f"one of {', '.join(map(str, get_args(kind)))}"))
        raise UserError(f"{name} must be {choices}, not {value!r}")
    if origin in (int, float):
        number = _number(value, origin)
        if number is not None:
            return number
    elif origin in (tuple, list, Sequence):
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return list(items)
    elif isinstance(value, origin):
        return value
    wanted = "list of str" if origin in (tuple, list, Sequence) else origin.__name__
    raise UserError(f"{name} must be of type {wanted}, not {value!r}")


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return None
    return None if isinstance(value, float) and number != value == value else number
