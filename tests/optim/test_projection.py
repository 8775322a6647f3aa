"""How heads of attention come of a linear map is found by looking, and so is the way back."""

import pytest
import torch
from torch import Tensor, nn

from zoft.optim.layers import find_linear_maps
from zoft.optim.projection import Rotation, projections
from zoft.optim.recording import Call


def rotated(x: Tensor, half: int, scale: float = 1.0) -> Tensor:
    """`x` [n, H, d] with every number i < half of a head turned with number i + half, by row; neighbours, if 1."""
    size = x.shape[2]
    first = torch.arange(0, size, 2) if half == 1 else torch.arange(half)
    second = first + half
    angles = torch.arange(1.0, len(x) + 1).view(-1, 1, 1) * 0.7 ** torch.arange(len(first))
    y = x.clone()
    y[..., first] = scale * (x[..., first] * angles.cos() - x[..., second] * angles.sin())
    y[..., second] = scale * (x[..., second] * angles.cos() + x[..., first] * angles.sin())
    return y


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("half, scale", [(8, 1.0), (4, 1.0), (1, 1.0), (8, 1.3)])
def test_a_rotation_is_found_and_its_way_back_is_autograds(half: int, scale: float, heads: int) -> None:
    """Of all numbers, of a part of them, or of neighbours; scaled, as longer contexts are reached by."""
    x = torch.randn(6, heads, 16, requires_grad=True)
    y = rotated(x, half, scale)
    found = Rotation.of(x.detach(), y.detach())
    assert found == Rotation(half)
    error = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, error)
    torch.testing.assert_close(found.pull(error, x.detach(), y.detach()), expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_rotation_is_none() -> None:
    x = torch.randn(6, 3, 16)
    assert Rotation.of(x, x.tanh()) is None
    assert Rotation.of(x, rotated(x, 8) * torch.linspace(1, 2, 16)) is None
    assert Rotation.of(x, torch.randn_like(x)) is None
    assert Rotation.of(x[..., 1:], torch.randn(6, 3, 15)) is None  # once an error: the last one has no neighbour


@pytest.mark.parametrize("half", [0, 1, 8])
@pytest.mark.parametrize("places, once", [([3, 1, 1], [3, 1, 1]), ([3, 3, 1, 1], [3, 1])])
def test_heads_are_found_in_what_one_map_makes_of_several(half: int, places: list[int], once: list[int]) -> None:
    """In whatever order, some of them the same, as heads that share their keys have them."""
    layer, x = nn.Linear(20, 5 * 16), torch.randn(6, 20)
    (found_map,) = find_linear_maps(nn.Sequential(layer))
    y = layer(x).detach()
    pieces = y.view(6, 5, 16)[:, places]
    heads = rotated(pieces, half) if half else pieces.clone()
    call = Call("0", layer, x, y)
    ((found_call, found),) = projections(heads, [call], [], {"0": found_map})
    columns = torch.arange(80).view(5, 16)[once].flatten()
    assert found_call is call and torch.equal(found.columns, columns) and found.rotation == Rotation(half)
    outputs = y.clone().requires_grad_()
    made = outputs.view(6, 5, 16)[:, places]
    error = torch.randn_like(heads)
    (expected,) = torch.autograd.grad(rotated(made, half) if half else made, outputs, error)
    torch.testing.assert_close(found.pull(error, y, heads), expected, rtol=1e-4, atol=1e-5)
    one = heads[:, ::2] if len(once) < len(places) else heads  # as attention that repeats them itself is given them
    torch.testing.assert_close(found.pull(error, y, one), expected, rtol=1e-4, atol=1e-5)
    assert list(projections(torch.randn(6, 3, 16), [call], [], {"0": found_map})) == []


def test_padding_that_is_embedded_as_zeros_shows_nothing() -> None:
    """Once a model's first block was taken for one without queries, if the batch that was looked at ended so."""
    layer, x = nn.Linear(20, 32, bias=False), torch.randn(6, 20)
    (found_map,) = find_linear_maps(nn.Sequential(layer))
    maps = {"0": found_map}
    for there, count in ((4, 1), (1, 0)):
        x[there:] = 0
        y = layer(x).detach()
        found = list(projections(rotated(y.view(6, 2, 16), 8), [Call("0", layer, x, y)], [], maps))
        assert [projection.rotation for _, projection in found] == [Rotation(8)] * count
