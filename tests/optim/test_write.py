"""Writes into the weights: exact in float32, right on average in half precision."""

import math

import pytest
import torch
from torch import Tensor

from zoft.optim.noise import normal
from zoft.optim.write import ELEMENTS, _dithered, add_dense_, add_low_rank_, add_noise_

HALF = [torch.bfloat16, torch.float16]
WIDE = [torch.float32, torch.float64]


def neighbours(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two values of `dtype` around float64 `exact`."""
    nearest = exact.to(dtype)
    inf = torch.full_like(nearest, math.inf)
    down = torch.where(nearest.double() <= exact, nearest, torch.nextafter(nearest, -inf))
    return down, torch.where(down.double() == exact, down, torch.nextafter(down, inf))


def mean_of_writes(weight: Tensor, delta: Tensor, count: int) -> Tensor:
    total = torch.zeros_like(weight, dtype=torch.float64)
    for i in range(count):
        written = weight.clone()
        add_dense_(written, delta, (i, "rounding"))
        total += written.double()
    return total / count


@pytest.mark.parametrize("dtype", HALF)
def test_each_result_is_a_neighbour_of_the_exact_one(dtype: torch.dtype) -> None:
    weight, delta = normal((0, "w"), (4000,)).to(dtype), 0.01 * normal((0, "d"), (4000,))
    exact = (weight.float() + delta).double()
    written = weight.clone()
    add_dense_(written, delta, (1,))
    down, up = neighbours(exact, dtype)
    assert bool(((written == down) | (written == up)).all())
    assert bool((written == down).any())
    assert bool((written == up).any())


@pytest.mark.parametrize("scale", [1.0, 1e-5], ids=["normal", "small"])
@pytest.mark.parametrize("dtype", HALF)
def test_rounding_is_unbiased_over_keys(dtype: torch.dtype, scale: float) -> None:
    """The small scale lies among float16's subnormal numbers, as some weights of real models do."""
    count = 2000
    weight, delta = (scale * normal((0, "w"), (500,))).to(dtype), 1e-3 * scale * normal((0, "d"), (500,))
    exact = (weight.float() + delta).double()
    down, up = (t.double() for t in neighbours(exact, dtype))
    error = (mean_of_writes(weight, delta, count) - exact) / (up - down)  # in units in the last place
    # A rounding error has variance at most 1/4 unit^2: four standard errors of the mean over elements, five of each.
    assert abs(float(error.mean())) < 4 * 0.5 / math.sqrt(count * error.numel())
    assert float(error.abs().max()) < 5 * 0.5 / math.sqrt(count)


@pytest.mark.parametrize("dtype", HALF)
def test_a_value_that_is_representable_stays(dtype: torch.dtype) -> None:
    weight = normal((0, "w"), (1000,)).to(dtype)
    written = weight.clone()
    add_dense_(written, torch.zeros(1000), (1,))
    assert torch.equal(written, weight)


@pytest.mark.parametrize("dtype", WIDE)
def test_wide_weights_take_the_plain_sum(dtype: torch.dtype) -> None:
    weight, delta = normal((0, "w"), (7, 5)).to(dtype), normal((0, "d"), (7, 5))
    dense, low_rank = weight.clone(), weight.clone()
    add_dense_(dense, delta, (1,))
    assert torch.equal(dense, weight + delta.to(dtype))
    left, right = normal((0, "l"), (7, 2)), normal((0, "r"), (5, 2))
    add_low_rank_(low_rank, left, right, (1,))
    torch.testing.assert_close(low_rank, weight + left.to(dtype) @ right.t().to(dtype))


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (300, ELEMENTS // 128)], ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_a_low_rank_write_equals_the_dense_write(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Chunks of rows continue one dither sequence."""
    weight = normal((0, "w"), shape).to(dtype)
    left, right = normal((0, "l"), (shape[0], 1)), normal((0, "r"), (shape[1], 1))
    low_rank, dense = weight.clone(), weight.clone()
    add_low_rank_(low_rank, left, right, (3,))
    add_dense_(dense, torch.addmm(weight.float(), left, right.t()) - weight.float(), (3,))
    differing = (low_rank != dense).double().mean()
    assert differing < 1e-3  # the two sums may round apart in float32's last bit
    torch.testing.assert_close(low_rank, dense)


@pytest.mark.parametrize("offset", [2**31 - 1000, 2**62 + 777], ids=hex)
@pytest.mark.parametrize("dtype", HALF)
def test_the_dither_repeats_every_65536_elements_however_large_the_weight(dtype: torch.dtype, offset: int) -> None:
    exact, first = normal((0, "w"), (2000,)), offset % 2**16
    far = _dithered(exact.clone(), dtype, offset, (3,))
    assert torch.equal(far, _dithered(exact.clone(), dtype, first, (3,)))
    whole = _dithered(torch.cat([torch.zeros(first), exact]), dtype, 0, (3,))
    assert torch.equal(far, whole[first:])


@pytest.mark.parametrize("dtype", [*HALF, *WIDE])
def test_a_low_rank_write_reaches_a_transposed_weight(dtype: torch.dtype) -> None:
    storage = torch.zeros(5, 7, dtype=dtype)
    add_low_rank_(storage.t(), torch.ones(7, 1), torch.ones(5, 1), (1,))
    assert torch.equal(storage, torch.ones(5, 7, dtype=dtype))


@pytest.mark.parametrize("shape", [(11,), (3, 5)], ids=str)
def test_a_noise_write_adds_the_named_streams(shape: tuple[int, ...]) -> None:
    parameter = torch.zeros(shape)
    add_noise_(parameter, [((1, "a"), 0.5), ((2, "b"), -2.0)], ())
    torch.testing.assert_close(parameter, 0.5 * normal((1, "a"), shape) - 2 * normal((2, "b"), shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_noise_write_reaches_a_parameter_that_is_not_contiguous(dtype: torch.dtype) -> None:
    parameter = torch.zeros(3, 5, dtype=dtype).t()
    add_noise_(parameter, [((1, "a"), 0.5)], (0,))
    torch.testing.assert_close(parameter.float(), 0.5 * normal((1, "a"), (5, 3)), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_updates_far_below_one_unit_survive_500_writes(dtype: torch.dtype) -> None:
    weight = (0.02 + 0.01 * normal((0, "w"), (40, 50)).abs()).to(dtype)
    unit = 0.02 * torch.finfo(dtype).eps
    left, right = torch.full((40, 1), unit / 100), torch.ones(50, 1)
    stochastic, nearest = weight.clone(), weight.clone()
    for step in range(500):
        add_low_rank_(stochastic, left, right, (step,))
        nearest = (nearest.float() + left @ right.t()).to(dtype)
    moved = float((stochastic.double() - weight.double()).mean())
    expected = 500 * unit / 100
    assert moved == pytest.approx(expected, rel=0.05)  # about seven standard errors of the mean
    assert torch.equal(nearest, weight)


def test_equal_keys_round_equally_and_others_do_not() -> None:
    weight, delta = normal((0, "w"), (1000,)).bfloat16(), 1e-3 * normal((0, "d"), (1000,))
    first, again, other = weight.clone(), weight.clone(), weight.clone()
    for written, key in ((first, (1,)), (again, (1,)), (other, (2,))):
        add_dense_(written, delta, key)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
