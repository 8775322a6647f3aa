"""The noise: a pure function of its name and an index, standard normal, and nobody else's randomness."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoft.optim.noise import CHUNK, WIDTH, Key, _mix, _rows, normal, normal_chunks, normals, stream

MASK = (1 << 64) - 1
GOLDEN = {
    (0,): [-0.3252719, 0.9752649, 0.2718338, -1.2096764, -0.5724968, 1.7998992, 0.4507142, -0.4190956],
    (0, 1, 2, "model.layers.0.mlp.up_proj"): [
        -0.2016411,
        1.7021916,
        0.3730865,
        -0.4211010,
        0.9159320,
        2.0325527,
        -0.5108325,
        -0.1788940,
    ],
    (42, "é", -7): [0.3593427, 0.8663207, -0.3297920, 2.1253781, -0.8739163, 0.9581764, -1.1483687, 1.9382454],
}


def splitmix64(start: int, gamma: int, count: int) -> list[int]:
    """The published generator, in Python integers."""
    out = []
    for i in range(1, count + 1):
        z = (start + i * gamma) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def expected_stream(key: Key) -> tuple[int, int]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") | 1


def test_the_reference_generator_gives_the_published_numbers() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 0x9E3779B97F4A7C15, 4) == published


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_golden_values(key: Key) -> None:
    torch.testing.assert_close(normal(key, (8,)), torch.tensor(GOLDEN[key]), rtol=0, atol=1e-6)


def test_many_together_are_those_of_each_alone() -> None:
    shapes = [(5,), (4 * WIDTH,), (7, 3, 11), (1, 1), (4 * WIDTH + 1, 2)]
    keys: list[Key] = [(3, "a", i) for i in range(len(shapes))]
    for found, key, shape in zip(normals(keys, shapes), keys, shapes, strict=True):
        assert torch.equal(found, normal(key, shape))


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_integers_are_splitmix64_of_the_hashed_name(key: Key) -> None:
    start, gamma = stream(key)
    assert (start & MASK, gamma & MASK) == expected_stream(key)
    mixed = _mix(torch.arange(1, 1001) * gamma + start)
    assert [z & MASK for z in mixed.tolist()] == splitmix64(start & MASK, gamma & MASK, 1000)


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_normals_are_the_rows_that_the_integers_name(key: Key) -> None:
    parts = [(z >> 16 * part & 0xFFFF) ^ 0x8000 for z in splitmix64(*expected_stream(key), 30) for part in range(4)]
    assert torch.equal(normal(key, (30 * 4 * WIDTH,)), _rows(torch.device("cpu"))[parts].view(-1))


def test_columns_of_rows_are_quantiles_without_correlation() -> None:
    rows = _rows(torch.device("cpu")).double()
    assert len(rows.unique(dim=0)) == len(rows) == 1 << 16
    torch.testing.assert_close(rows.t() @ rows / len(rows), torch.eye(WIDTH, dtype=torch.float64), atol=1e-6, rtol=0)
    assert float(rows.mean(0).abs().max()) == float(rows.pow(3).mean(0).abs().max()) == 0
    for column in rows.t():
        levels = column.unique()  # each is met eight times
        expected = torch.special.ndtri((torch.arange(len(levels), dtype=torch.float64) + 0.5) / len(levels))
        torch.testing.assert_close(levels, expected, rtol=2e-4, atol=0)


def test_rows_follow_a_joint_normal_distribution() -> None:
    """In any direction: the fourth moment of a sum says whether sizes in a row depend on one another."""
    rows = _rows(torch.device("cpu")).double()
    for direction in (torch.ones(WIDTH), torch.arange(WIDTH) - 3.0, normal((0,), (WIDTH,))):
        along = rows @ (direction.double() / direction.double().norm())
        assert float(along.pow(4).mean()) == pytest.approx(3, abs=0.1)
        distance = (torch.special.ndtr(along.sort().values) - (torch.arange(len(along)) + 0.5) / len(along)).abs().max()
        assert distance < 0.01


@settings(max_examples=200, deadline=None)
@given(start=st.integers(0, 4000), length=st.integers(0, 600), seed=st.integers(0, 2**64))
def test_a_part_equals_the_same_part_of_the_whole(start: int, length: int, seed: int) -> None:
    whole = normal((seed, "part"), (start + length,))
    assert torch.equal(normal((seed, "part"), (length,), start=start), whole[start:])


@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 17])
def test_chunks_make_up_the_whole_in_any_order(count: int) -> None:
    out = torch.full((count,), math.nan)
    for where, values in reversed(list(normal_chunks((5, "chunks"), count))):
        out[where] = values
    assert torch.equal(out, normal((5, "chunks"), (count,)))


def test_shape_only_folds_the_stream() -> None:
    assert torch.equal(normal((1,), (3, 5, 7)).view(-1), normal((1,), (105,)))


def test_moments_are_those_of_a_standard_normal() -> None:
    z = normal((3, "moments"), (1_000_000,)).double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = float(z.pow(power).mean()) - expected
        assert abs(error) < 4 * math.sqrt(variance / len(z))  # four standard errors


def test_distribution_function_is_that_of_a_standard_normal() -> None:
    z = normal((4, "distribution"), (200_000,)).double().sort().values
    empirical = (torch.arange(len(z)) + 0.5) / len(z)
    distance = (torch.special.ndtr(z) - empirical).abs().max()
    assert distance < 1.95 / math.sqrt(len(z))  # Kolmogorov-Smirnov at level .001


def test_neighbours_in_a_stream_are_uncorrelated() -> None:
    z = normal((6, "lags"), (400_000,)).double()
    for lag in (1, 2, 3, 8, 32):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 4 / math.sqrt(len(z) - lag)


@pytest.mark.parametrize("other", [(1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b"), (0, 0, 0)], ids=str)
def test_seed_step_probe_and_name_each_make_another_stream(other: Key) -> None:
    n = 100_000
    first, second = normal((0, 0, 0, "a"), (n,)).double(), normal(other, (n,)).double()
    assert abs(float((first * second).mean())) < 4 / math.sqrt(n)  # four standard errors


def test_names_are_not_concatenated() -> None:
    assert stream((1, 23)) != stream((12, 3))
    assert stream((1, "2")) != stream((1, 2))


def test_torch_random_state_is_neither_read_nor_written() -> None:
    before = torch.get_rng_state()
    first = normal((9,), (1000,))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert torch.equal(normal((9,), (1000,)), first)
