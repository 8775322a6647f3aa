"""How far an estimate may move: its size beside that of the estimates before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MEMORY = 0.9  # of the running mean


@dataclass
class Pace:
    """The factor by which an estimate is scaled, from the size of its projected gradients, ``sqrt(mean g^2)``.

    Where every example has a direction of its own, the mean is over the examples' own g.
    With `clip`, an estimate larger than `clip` times the usual size is cut down to that, as gradients are clipped by
    their norm. With `normalise`, every estimate is divided by the usual size, so that lr is a distance and does not
    depend on the loss's scale; FZOO (arXiv 2506.09034) divides by the spread of one step's losses instead, which takes
    several probes a step. The usual size is the root of a running mean of squares, `square` (nan before the first).

    Raises:
        ValueError: `clip` is not above 0.
    """

    clip: float | None = None
    normalise: bool = False
    square: float = math.nan

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be None or above 0, not {self.clip}")

    def __call__(self, gradients: Sequence[float]) -> float:
        """The factor for an estimate with the projected `gradients`, which are counted; some are not 0."""
        square, scale = math.fsum(g * g for g in gradients) / len(gradients), 1.0
        if math.isnan(self.square):
            self.square = square
        if self.clip is not None:
            scale = min(1.0, self.clip * math.sqrt(self.square / square))
        self.square += (1 - MEMORY) * (square * scale**2 - self.square)
        return scale / math.sqrt(self.square) if self.normalise else scale
