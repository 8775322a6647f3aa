"""Divergence on synthetic losses: sequences that are noisy but healthy, and sequences that diverge."""

import math
import random
from collections.abc import Callable

import pytest

from zoft.train.divergence import History

Losses = Callable[[random.Random], list[float]]
STEPS = 300


def alarm(losses: list[float], still: Callable[[int], bool] = lambda step: False) -> tuple[int, int] | None:
    """The step at which divergence is seen, and the first that counts to it; None if it is not seen."""
    history = History()
    for step, loss in enumerate(losses, 1):
        history.add(loss, still(step))
        found = history.divergence()
        if found is not None:
            return step, step - found[1] + 1
    return None


def batch(rng: random.Random, size: int, level: float = 1.0) -> float:
    """The mean of losses that are mostly small and sometimes large, like those of a classification."""
    return level * sum(rng.choice((0.05, 0.1, 2.5)) * rng.uniform(0.5, 1.5) for _ in range(size)) / size


def by_length(rng: random.Random, size: int) -> list[float]:
    """In cycles of 50 from long texts to short ones, of three times the loss."""
    return [batch(rng, size, 1 + 2 * (step % 50) / 49) for step in range(STEPS)]


HEALTHY: dict[str, Losses] = {
    "single examples": lambda rng: [batch(rng, 1) for _ in range(STEPS)],
    "small batches": lambda rng: [batch(rng, 4) for _ in range(STEPS)],
    "usual batches": lambda rng: [batch(rng, 16) for _ in range(STEPS)],
    "hardly any noise": lambda rng: [rng.gauss(1, 0.01) for _ in range(STEPS)],
    "heavy tails": lambda rng: [rng.lognormvariate(0, 1.5) for _ in range(STEPS)],
    "by length, single": lambda rng: by_length(rng, 1),
    "by length": lambda rng: by_length(rng, 16),
    "two kinds of texts": lambda rng: [rng.gauss(1 if step % 50 < 20 else 3, 0.05) for step in range(STEPS)],
    "falling": lambda rng: [batch(rng, 16, math.exp(-step / 100)) for step in range(STEPS)],
    "a little higher": lambda rng: [rng.gauss(1 + 0.05 * (step > 60), 0.01) for step in range(STEPS)],
    "some not finite": lambda rng: [math.nan if rng.random() < 0.1 else batch(rng, 16) for _ in range(STEPS)],
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_no_false_alarm(kind: str) -> None:
    rng = random.Random(kind)
    assert [alarm(HEALTHY[kind](rng)) for _ in range(50)] == [None] * 50


@pytest.mark.parametrize("onset", [2, 12, 150])  # the first step with a higher loss
@pytest.mark.parametrize("rise", [1, 30])  # steps that the loss takes to rise
@pytest.mark.parametrize("level", [8, 100, math.nan])
def test_divergence_is_seen(onset: int, rise: int, level: float) -> None:
    """It is seen soon, and so is where it began, from a little before on."""
    rng, steps = random.Random(0), range(1, STEPS)
    for _ in range(20):
        levels = [1 + (level - 1) * min(1.0, (step - onset + 1) / rise) if step >= onset else 1 for step in steps]
        found = alarm([rng.gauss(1, 0.1) * level for level in levels])
        assert found is not None
        step, first = found
        assert onset + 5 <= step <= onset + rise + 75
        assert onset - 10 <= first <= onset + rise


def test_where_a_divergence_began_that_leaps_about() -> None:
    """It takes nineteen steps of it until the median of twenty is large; the checkpoints between are ruined."""
    assert alarm([1.0] * 30 + [50.0, 1.0] * 20) == (49, 31)


def test_losses_that_never_were_finite() -> None:
    """No smaller learning rate would help, so it is no divergence."""
    history = History()
    for _ in range(60):
        history.add(math.nan)
    assert history.never_finite and history.divergence() is None
    history.add(1.0)
    assert not history.never_finite


def test_standing_still_from_the_start() -> None:
    history = History()
    for step in range(1, 41):
        history.add(1.0, still=True)
        assert history.mostly_still == (step >= 10)
        assert history.divergence() is None


@pytest.mark.parametrize(("level", "diverged"), [(0.9, True), (0.0, False)])
def test_coming_to_stand_still(level: float, diverged: bool) -> None:
    """A model whose loss stays where it was is saturated; one whose loss has come down to nothing has learned."""
    losses = [1.0] * 15 + [level] * 40
    assert (alarm(losses, lambda step: step > 15) == (35, 16)) == diverged
    if not diverged:
        assert alarm(losses, lambda step: step > 15) is None


def test_a_model_that_saturates_does_not_count_as_one_that_stands_still() -> None:
    history = History()
    for step in range(40):
        history.add(1.0, still=step >= 15)
        assert not history.mostly_still
