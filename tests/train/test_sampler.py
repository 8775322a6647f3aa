"""The order of training examples."""

from types import SimpleNamespace
from typing import Any

from zoft.train.task_trainer import EpochSampler

LENGTHS = [1 + (i * 7) % 13 for i in range(40)]


def order(seed: int = 0, step: int = 0, accumulate: int = 1, lengths: list[int] = LENGTHS) -> list[int]:
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(seed=seed, train_batch_size=8, gradient_accumulation_steps=accumulate),
        state=SimpleNamespace(global_step=step),
    )
    return list(EpochSampler(trainer, lengths))


def test_every_example_once() -> None:
    assert sorted(order()) == list(range(40))


def test_a_seed_and_an_epoch_have_their_order() -> None:
    """An epoch is five batches of eight, which are five steps, or three if a step takes two of them."""
    assert order(step=0) == order(step=4)
    assert order(step=5) == order(step=9) != order(step=4)
    assert order(step=3, accumulate=2) == order(step=5, accumulate=2) != order(step=2, accumulate=2)
    assert order(seed=0) != order(seed=1)


def test_batches_are_of_like_length() -> None:
    lengths = LENGTHS * 10

    def padding(indices: list[int]) -> int:
        batches = [[lengths[i] for i in indices[start : start + 8]] for start in range(0, len(lengths), 8)]
        return sum(max(batch) - length for batch in batches for length in batch)

    assert padding(order(lengths=lengths)) < padding(list(range(len(lengths)))) / 4
