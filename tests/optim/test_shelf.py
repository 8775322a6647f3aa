"""Small tensors that stay lie together, and not in the holes that large ones leave."""

import io

import pytest
import torch

from zoft.optim import AGZO, Guided, cross_entropy
from zoft.optim.kept import Kept
from zoft.optim.shelf import ALIGNED, SLAB, SMALL, Shelf

from .models import llama, token_batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_copies_are_equal_and_stay_so(dtype: torch.dtype) -> None:
    shelf = Shelf()
    tensors = [(torch.randn(n, 7) * 9).to(dtype).t() for n in range(1, 40)]
    copies = [shelf.put(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype == dtype and torch.equal(copy, tensor)
        tensor.zero_()
    assert all(bool(copy.any()) for copy in copies[1:])
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert all(copy.data_ptr() % ALIGNED == 0 for copy in copies)


def test_a_full_slab_is_followed_by_another() -> None:
    shelf = Shelf()
    copies = [shelf.put(torch.full((SMALL,), value, dtype=torch.uint8)) for value in range(2 * SLAB // SMALL)]
    assert [copy.unique().tolist() for copy in copies] == [[value] for value in range(len(copies))]
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 2


def test_what_is_not_small_is_not_copied() -> None:
    shelf = Shelf()
    for tensor in (torch.zeros(SMALL + 1, dtype=torch.uint8), torch.zeros(0, 3), torch.zeros(3, device="meta")):
        assert shelf.put(tensor) is tensor


def test_either_mode_writes_on_what_the_other_has_begun() -> None:
    shelf, number = Shelf(), torch.ones(1, dtype=torch.uint8)
    with torch.inference_mode():
        copies = [shelf.put(number)]
    copies.append(shelf.put(2 * number))
    with torch.inference_mode():
        copies.append(shelf.put(3 * number))
    assert [int(copy) for copy in copies] == [1, 2, 3]


@pytest.mark.parametrize("method", [AGZO, Guided])
def test_bases_lie_together(method: type[AGZO] | type[Guided]) -> None:
    model, batch = llama(), token_batch()
    optimizer = method(model)
    optimizer.estimate(lambda: cross_entropy(model(batch["input_ids"]).logits, batch["labels"]))
    assert len(optimizer.bases) > 4
    assert {basis.untyped_storage().nbytes() for basis in optimizer.bases.values()} == {SLAB}


def test_a_checkpoint_has_no_shelf_in_it() -> None:
    """Once it had all of the slab, with what the memory held before."""
    model, batch, file = llama(), token_batch(), io.BytesIO()
    optimizer = AGZO(model)
    optimizer.estimate(lambda: cross_entropy(model(batch["input_ids"]).logits, batch["labels"]))
    torch.save(optimizer.state_dict(), file)
    assert optimizer.bases and len(file.getvalue()) < SLAB / 8


@pytest.mark.parametrize("attention", [False, True])
def test_rows_kept_for_the_way_back_lie_together(monkeypatch: pytest.MonkeyPatch, attention: bool) -> None:
    kept: list[torch.Tensor] = []
    take = Kept.take

    def see(self: Kept, *arguments: object) -> torch.Tensor:
        kept.extend((*self.learned_from.values(), *self.outputs.values(), *self.inputs.values()))
        return take(self, *arguments)

    monkeypatch.setattr(Kept, "take", see)
    model, batch = llama(), token_batch()
    Guided(model, attention=attention).step(lambda: cross_entropy(model(batch["input_ids"]).logits, batch["labels"]))
    assert len(kept) > 4 and {rows.untyped_storage().nbytes() for rows in kept} == {SLAB}
