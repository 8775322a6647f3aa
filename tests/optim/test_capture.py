"""Bases taken inside the forward pass: without padding, once per input, and nothing kept."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoft.optim.capture import Basis, captured, leading_basis
from zoft.optim.layers import LinearMap, find_linear_maps
from zoft.optim.noise import normal

from .models import ARCHITECTURES, llama, token_batch


def exact(rank: int = 1) -> Any:
    """Extraction of the exact leading directions."""
    return lambda layer, rows: leading_basis(rows, torch.empty(len(rows), rank), None)


def bases_of(model: nn.Module, *inputs: Tensor, rank: int = 1, **keywords: Tensor) -> dict[str, Basis]:
    with torch.no_grad(), captured(model, find_linear_maps(model), exact(rank)) as bases:
        model(*inputs, **keywords)
    return bases


def assert_same_spans(first: dict[str, Basis], second: dict[str, Basis]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        a, b = first[name], second[name]
        torch.testing.assert_close(a.sigma, b.sigma, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.vectors @ a.vectors.t(), b.vectors @ b.vectors.t(), rtol=0, atol=1e-3)


class Recorder:
    """Counts the extractions and remembers the rows they saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Tensor]] = []

    def __call__(self, layer: LinearMap, rows: Tensor) -> Basis:
        self.seen.append((layer.name, rows.clone()))
        return exact()(layer, rows)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "opt"])
def test_padding_never_enters(architecture: str) -> None:
    model, names = ARCHITECTURES[architecture][0](), ARCHITECTURES[architecture][1]
    batch = token_batch()
    del batch["labels"]
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[0] *= 1000  # what padding positions carry
        embedding[63] = embedding[0] * torch.linspace(-1, 3, 32)
    whole = bases_of(model, **batch)
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 63)
    assert_same_spans(whole, bases_of(model, input_ids=ids, attention_mask=batch["attention_mask"]))

    with torch.no_grad(), captured(model, find_linear_maps(model), exact()) as alone:
        shortest = int(batch["attention_mask"].sum(1).argmin())
        kept = int(batch["attention_mask"][shortest].sum())
        model(input_ids=batch["input_ids"][shortest : shortest + 1, :kept])
    padded = bases_of(model, **{k: v[shortest : shortest + 1] for k, v in batch.items()})
    assert alone.keys() == set(names)
    assert_same_spans(alone, padded)


def test_a_mask_without_padding_changes_nothing() -> None:
    model, ids = llama(), token_batch()["input_ids"]
    assert_same_spans(bases_of(model, input_ids=ids), bases_of(model, input_ids=ids, attention_mask=torch.ones(8, 10)))


def test_a_mask_that_is_given_first_is_not_taken_for_the_inputs() -> None:
    """Once one of floating-point numbers was, as rows of features, and padding entered."""
    model, batch = llama(), token_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"].float()
    assert_same_spans(bases_of(model, attention_mask=mask, input_ids=ids), bases_of(model, **batch))


def test_the_mask_of_one_forward_is_forgotten_in_the_next() -> None:
    model, batch = llama(), token_batch()
    with torch.no_grad(), captured(model, find_linear_maps(model), recorder := Recorder()):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        masked = len(recorder.seen[0][1])
        recorder.seen.clear()
        model(input_ids=batch["input_ids"])
    assert (masked, len(recorder.seen[0][1])) == (batch["attention_mask"].sum(), batch["attention_mask"].numel())


def test_layers_that_share_an_input_share_one_extraction() -> None:
    model, recorder = llama(), Recorder()
    with torch.no_grad(), captured(model, find_linear_maps(model), recorder) as bases:
        model(**token_batch())
    assert len(recorder.seen) == 2 * 4 + 1  # q/k/v, o, gate/up, down in each block, and the head
    attention = "model.layers.0.self_attn"
    assert bases[f"{attention}.q_proj"] is bases[f"{attention}.v_proj"]


def test_an_input_changed_in_place_is_seen_anew() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            x.copy_(normal((1, "other"), tuple(x.shape)))
            return self.second(x) + y

    bases = bases_of(InPlace(), normal((0, "x"), (12, 4)))
    expected = exact()(None, normal((1, "other"), (12, 4)))
    torch.testing.assert_close(bases["second"].sigma, expected.sigma)


def test_a_layer_called_twice_has_the_merged_basis() -> None:
    shared = nn.Linear(4, 4, bias=False)
    model, x = nn.Sequential(shared, nn.Tanh(), shared), normal((0, "x"), (12, 4))
    bases = bases_of(model, x, rank=4)
    with torch.no_grad():
        stacked = torch.cat((x, shared(x).tanh()))
    torch.testing.assert_close(bases["0"].sigma, torch.linalg.svdvals(stacked))


def test_a_layer_without_rows_has_no_basis() -> None:
    assert bases_of(nn.Sequential(nn.Linear(4, 4)), torch.empty(0, 4)) == {}


def test_activations_are_let_go_during_the_forward() -> None:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.Tanh())))
    inputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def remember(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        alive.append(sum(ref() is not None for ref in inputs))
        inputs.append(weakref.ref(args[0]))

    for layer in model[2::2]:
        layer.register_forward_pre_hook(remember)
    with torch.no_grad(), captured(model, find_linear_maps(model), exact()) as bases:
        model(normal((0, "x"), (12, 4)))
        assert [ref() for ref in inputs] == [None, None, None]
    assert alive == [0, 0, 0]
    assert len(bases) == 4


def test_no_hook_is_left_behind_even_when_the_forward_raises() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError), captured(model, find_linear_maps(model), exact()):
        model(torch.ones(2, 5))
    assert not model._forward_pre_hooks
    assert not model[0]._forward_pre_hooks


def test_under_autocast_bases_keep_their_precision() -> None:
    """Its products would be in bfloat16."""
    model, batch, seen = llama(), token_batch(), {}

    def extract(layer: LinearMap, rows: Tensor) -> Basis:
        seen[layer.name] = rows.clone()
        return leading_basis(rows, torch.ones(len(rows), 1), 0)

    maps = find_linear_maps(model)
    with torch.no_grad(), captured(model, maps, extract) as bases, torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    assert any(rows.dtype == torch.bfloat16 for rows in seen.values())
    for name, rows in seen.items():
        torch.testing.assert_close(bases[name].vectors, extract(maps[0], rows).vectors, rtol=0, atol=1e-6)
