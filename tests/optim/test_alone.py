"""Through attention, tokens with little error are left out of what treats each token alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from zoft.optim import Guided
from zoft.optim.kept import _alike

from .guidance import BUILDERS, NORMALISED, closure_of, error, estimated, stream_of
from .models import llama, token_batch


def early() -> dict[str, Tensor]:
    """A batch in which the first tokens are learned from: those behind them have no error at all."""
    batch = token_batch()
    batch["labels"][:, 3:] = -100
    return batch


@contextmanager
def rows_through(modules: list[nn.Module]) -> Iterator[list[int]]:
    """How many rows each of `modules` was called with, in order."""
    rows: list[int] = []
    handles = [
        module.register_forward_hook(lambda _, args, output: rows.append(args[0].shape[:-1].numel()))
        for module in modules
    ]
    yield rows
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"openai-gpt"}))
def test_tokens_without_error_are_left_out_for_nothing(name: str) -> None:
    model = BUILDERS[name]()
    closure, optimizer = closure_of(model, early()), Guided(model, rank=8, attention=True, energy=1.0)
    expected = estimated(optimizer, closure)
    optimizer.estimator.energy = 1 - 1e-6
    blocks = stream_of(model).blocks
    (last,) = blocks[-1].writers[-1].map.modules
    with rows_through([last]) as rows:
        found = estimated(optimizer, closure)
    assert (rows[-1] < rows[0]) == (name not in NORMALISED)  # there a norm of the stream takes all tokens
    assert {key: e for key in found if (e := error(found[key], expected[key])) > 5e-3} == {}


def test_in_the_last_block_the_fewest_go_back_that_have_as_much_of_the_error() -> None:
    model, batch, states = llama(), token_batch(), []
    batch["labels"][:, :4] = -100
    closure = closure_of(model, batch)
    handle = model.model.layers[-1].register_forward_hook(lambda _, args, output: states.append(output))
    loss = closure().values.float()
    handle.remove()
    (slope,) = torch.autograd.grad(loss, states)
    squared = slope[batch["attention_mask"].bool()].square().sum(1)
    for energy in (0.3, 0.6, 0.9):
        optimizer = Guided(model, rank=8, attention=True, energy=energy)
        with rows_through([model.model.layers[-1].mlp.down_proj]) as rows:
            estimated(optimizer, closure)
        count = rows[-1]
        largest = squared.sort(descending=True).values.cumsum(0) / squared.sum()
        assert count < len(squared) and largest[count - 1] >= energy - 1e-4 and largest[count - 2] < energy + 1e-4
        optimizer.branches.detach()


def test_the_less_is_left_out_the_nearer_is_the_estimate_to_that_of_all() -> None:
    model, batch = llama(num_hidden_layers=4), token_batch()
    batch["labels"][:, :4] = -100
    closure, optimizer = closure_of(model, batch), Guided(model, rank=8, attention=True, energy=1.0)
    whole = torch.cat([product.flatten() for product in estimated(optimizer, closure).values()])
    cosines = []
    for energy in (0.5, 0.9, 0.99):
        optimizer.estimator.energy = energy
        part = torch.cat([product.flatten() for product in estimated(optimizer, closure).values()])
        cosines.append(float(torch.cosine_similarity(part, whole, dim=0)))
    assert cosines == sorted(cosines) and cosines[-1] > 0.97


@pytest.mark.parametrize("energy", [0.0, 1.5, float("nan")])
def test_energy_is_a_share(energy: float) -> None:
    with pytest.raises(ValueError, match="energy is a share, above 0 and up to 1, not"):
        Guided(llama(), attention=True, energy=energy)


def test_rounding_is_not_something_else() -> None:
    """Products with fewer rows are rounded otherwise: in bfloat16 by .008 of a row, which once ended the run."""
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    off = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert _alike(rows, rows + 0.01 * off) and not _alike(rows, rows + 0.1 * off)
