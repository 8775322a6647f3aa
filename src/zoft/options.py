"""Options as they are written on a command line."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from zoft.errors import UserError


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """``rank=4`` as ``{"rank": 4}``; what is no Python literal is text.

    Raises:
        UserError: one has no ``=``.
    """
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"option {pair!r} is not of the form name=value")
        options[name.strip()] = _literal(value.strip())
    return options


def _literal(text: str) -> Any:
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
