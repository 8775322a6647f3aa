"""What has happened in a training so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What has happened so far. `skipped` estimates had a loss that was not finite, `zero` ones saw no change."""

    steps: int = 0
    forwards: int = 0
    skipped: int = 0
    zero: int = 0


class EstimateWarning(UserWarning):
    """An estimate was not used: the loss was not finite, or did not change."""
