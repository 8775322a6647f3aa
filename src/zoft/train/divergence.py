"""Whether training diverges, from what its steps have shown."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

FIRST, LAST = 20, 50  # losses compared by rank
RISE = 1.1
RECENT = 20  # steps looked at for what needs no comparison
MOST = RECENT // 2
HUGE = 20.0  # nats: worse than guessing among all the tokens of any vocabulary


@dataclass
class History:
    """What is remembered of the steps so far, and whether it amounts to divergence.

    `first` and `last` are losses, infinite where they were not finite; `still` says of the last steps whether the loss
    stood still under the probes, `moved` whether in any step so far it did not.

    Training diverges in one of three ways:

    - It explodes: the median of the last 20 losses is above 20 nats and ten times the first loss, or not finite.
    - It rises: the last 50 losses lie clearly above the first 20 (or as many as came before the 50): the lowest of the
      last (three may be lower) above the highest first one by a tenth, and moreover by its distance from their median
      divided by the number of first ones, since few of those prove little. Ranks, because batch losses are distributed
      in every way: where nothing grows, 17 of 20 are above 20 others once in 78 million times. And 50 because
      `LengthGroupedSampler` of transformers goes from long texts to short ones over up to 50 batches, and the short
      ones may have the higher losses.
    - It saturates: the loss, which used to change under the probes, has stood still for 20 steps and has not halved.
    """

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    still: list[bool] = field(default_factory=list)
    moved: bool = False

    def add(self, loss: float, still: bool = False) -> None:
        """Take in the next step."""
        self.last.append(loss if math.isfinite(loss) else math.inf)
        if len(self.last) > LAST:
            oldest = self.last.pop(0)
            if len(self.first) < FIRST:
                self.first.append(oldest)
        self.still = [*self.still, still][-RECENT:]
        self.moved |= not still

    @property
    def never_finite(self) -> bool:
        """Whether there was no finite loss in ten steps or more."""
        return len(self.last) >= MOST and min(self.first + self.last) == math.inf

    @property
    def mostly_still(self) -> bool:
        """Whether the loss stood still in half of the last 20 steps or more, and not because the model saturates."""
        return sum(self.still) >= MOST and not (self.may_saturate and all(self.still[-MOST:]))

    @property
    def may_saturate(self) -> bool:
        """Whether a loss that stands still would mean that updates saturated the model, not that it has learned."""
        return self.moved and self._recent > self._start / 2

    def divergence(self) -> tuple[str, int] | None:
        """What it shows in, in words, and over how many of the last steps; None if training does not diverge."""
        if len(self.last) < MOST:
            return None
        start, middle = self._start, self._recent
        if middle > max(HUGE, 10 * start):
            now = f"{middle:.3g}" if math.isfinite(middle) else "not finite"
            steps = min(len(self.last), RECENT)
            return f"the loss, {start:.3g} at first, is {now} (median of the last {steps} steps)", self._since(MOST)
        if self.may_saturate and sum(self.still) == RECENT:
            return f"the loss has come to stand still, for {RECENT} steps now", self._since(RECENT)
        if not self.first:
            return None
        spared, highest, middle = len(self.first) // 6, max(self.first), statistics.median(self.last)
        lowest = sorted(self.last)[spared]
        if not lowest - (middle - lowest) / len(self.first) > RISE * highest:  # nor if all of them are infinite
            return None
        now = f"{middle:.3g} (median of the last {LAST} steps)"
        return f"the loss, at most {highest:.3g} at first, has risen to {now}", self._since(LAST - spared)

    @property
    def _start(self) -> float:
        return (self.first + self.last)[0]

    @property
    def _recent(self) -> float:
        return statistics.median(self.last[-RECENT:])

    def _since(self, steps: int) -> int:
        """The last `steps`, and those before them in which, but for single ones, the loss was twice the first one."""
        while steps < len(self.last) and max(self.last[:-steps][-2:]) > 2 * self._start:
            steps += 1
        return steps
