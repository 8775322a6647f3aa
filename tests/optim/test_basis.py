"""The leading directions of a matrix of activations, against its singular value decomposition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoft.optim.capture import ROWS, Basis, leading_basis, merge, whitened
from zoft.optim.noise import normal


def rows_with_spectrum(spectrum: list[float], count: int = 60, d: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix [count, d] with these singular values, and its right singular vectors [d, len(spectrum)]."""
    left = torch.linalg.qr(normal((seed, "left"), (count, len(spectrum)))).Q
    right = torch.linalg.qr(normal((seed, "right"), (d, len(spectrum)))).Q
    return left @ torch.diag(torch.tensor(spectrum)) @ right.t(), right


def sine_of_largest_angle(a: Tensor, b: Tensor) -> float:
    """Of the principal angles between the spans of orthonormal `a` and `b`, the largest."""
    return float(torch.linalg.matrix_norm(a - b @ (b.t() @ a), ord=2))


def basis_of(rows: Tensor, rank: int, power_steps: int | None) -> Basis:
    return leading_basis(rows, normal((1, "omega"), (len(rows), min(rank, len(rows)))), power_steps)


GAP = [10.0, 8.0, 1.0, 0.8, 0.6, 0.4]


def test_power_iteration_finds_the_leading_singular_vectors_across_a_gap() -> None:
    rows, right = rows_with_spectrum(GAP)
    found = basis_of(rows, 2, power_steps=3)
    assert sine_of_largest_angle(found.vectors, right[:, :2]) < 1e-4
    torch.testing.assert_close(found.sigma.sort(descending=True).values, torch.tensor(GAP[:2]), rtol=0.05, atol=0)


def test_every_power_step_shrinks_the_angle_by_the_squared_gap() -> None:
    rows, right = rows_with_spectrum([2.0, 1.0, 0.5])
    angles = [sine_of_largest_angle(basis_of(rows, 1, steps).vectors, right[:, :1]) for steps in range(6)]
    for before, after in itertools.pairwise(angles):
        assert after < before * 0.3  # theory: (1 / 2)^2


def test_no_power_steps_means_exact_decomposition() -> None:
    rows, right = rows_with_spectrum([3.0, 2.9, 2.8, 2.7])
    found = basis_of(rows, 3, power_steps=None)
    assert sine_of_largest_angle(found.vectors, right[:, :3]) < 1e-5
    torch.testing.assert_close(found.sigma, torch.tensor([3.0, 2.9, 2.8]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", [2, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whitened_directions_have_activations_equally_large(rank: int, dtype: torch.dtype) -> None:
    """But for those beyond the activations' own rank, 6, which are rounding."""
    rows, _ = rows_with_spectrum(GAP)
    basis = basis_of(rows.to(dtype), rank, power_steps=None)
    vectors = whitened(basis)
    own = min(rank, 6)
    torch.testing.assert_close((rows @ vectors).norm(dim=0)[:own], torch.full((own,), GAP[own - 1]), rtol=0.02, atol=0)
    torch.testing.assert_close(vectors[:, own - 1 :], basis.vectors[:, own - 1 :])
    torch.testing.assert_close(vectors / vectors.norm(dim=0), basis.vectors)


def test_directions_without_activations_keep_their_length() -> None:
    for rows in (5, 0):
        basis = basis_of(torch.zeros(rows, 4), 3, power_steps=3)
        assert torch.equal(whitened(basis), basis.vectors) and basis.vectors.shape == (4, min(rows, 3))


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 40),
    d=st.integers(1, 40),
    rank=st.integers(1, 8),
    power_steps=st.sampled_from([None, 0, 1, 3]),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_vectors_are_orthonormal_and_the_rank_is_clipped(
    count: int, d: int, rank: int, power_steps: int | None, scale: float
) -> None:
    found = basis_of(normal((2, "rows"), (count, d)) * scale, rank, power_steps)
    r = min(rank, count, d)
    assert found.vectors.shape == (d, r)
    assert found.sigma.shape == (r,)
    torch.testing.assert_close(found.vectors.t() @ found.vectors, torch.eye(r), rtol=0, atol=1e-5)


@pytest.mark.parametrize("power_steps", [None, 3])
def test_vectors_stay_orthonormal_when_the_activations_have_lower_rank(power_steps: int | None) -> None:
    rows, right = rows_with_spectrum([5.0])
    found = basis_of(rows, 3, power_steps)
    torch.testing.assert_close(found.vectors.t() @ found.vectors, torch.eye(3), rtol=0, atol=1e-5)
    assert sine_of_largest_angle(right, found.vectors) < 1e-5


def test_more_rows_than_are_converted_at_a_time_change_nothing() -> None:
    rows = normal((3, "tall"), (2 * ROWS + 11, 6)) * torch.tensor([9.0, 7.0, 1.0, 1.0, 1.0, 1.0])
    found, exact = basis_of(rows, 2, power_steps=4), basis_of(rows, 2, power_steps=None)
    assert sine_of_largest_angle(found.vectors, exact.vectors) < 1e-4


def test_bfloat16_rows_give_a_float32_basis() -> None:
    rows, right = rows_with_spectrum(GAP)
    found = basis_of(rows.bfloat16(), 2, power_steps=3)
    assert found.vectors.dtype == torch.float32
    assert sine_of_largest_angle(found.vectors, right[:, :2]) < 0.02  # rounding of the rows: 2^-9 each


def test_large_float16_rows_do_not_overflow() -> None:
    rows, right = rows_with_spectrum(GAP)
    found = basis_of((rows * 5000).half(), 2, power_steps=3)
    assert sine_of_largest_angle(found.vectors, right[:, :2]) < 0.01


def test_merged_exact_bases_are_those_of_the_stacked_rows() -> None:
    first, second = normal((4, "a"), (30, 6)), normal((4, "b"), (9, 6)) * 3
    merged = merge(basis_of(first, 6, None), basis_of(second, 6, None))
    stacked = basis_of(torch.cat((first, second)), 6, None)
    torch.testing.assert_close(merged.sigma, stacked.sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        merged.vectors.abs(), stacked.vectors.abs(), rtol=0, atol=1e-4
    )  # singular vectors have no sign


def test_merging_weighs_directions_by_their_singular_values() -> None:
    strong = Basis(torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([10.0]))
    weak = Basis(torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([1.0]))
    for merged in (merge(strong, weak), merge(weak, strong)):
        torch.testing.assert_close(merged.vectors.abs(), strong.vectors)
        torch.testing.assert_close(merged.sigma, strong.sigma)
