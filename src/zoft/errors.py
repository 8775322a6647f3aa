"""The one exception that is the user's to fix, and what it says of a name that is unknown."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user. The message is one line: what is wrong, where, and what to do about it."""


def near_miss(name: str, known: Iterable[str]) -> str:
    """What to say after "unknown": the nearest of the `known` names, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name).lower(), known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
