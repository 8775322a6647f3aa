"""Which modules are linear maps, which way their weights lie, and what is left out."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from zoft.optim.layers import LinearMap, NoLinearLayers, find_linear_maps, other_parameters

from .models import closure_of, llama, tied_llama, token_batch


class Plain(nn.Module):
    """A linear map with a [d_out, d_in] weight and no more to tell it by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class Packed(nn.Module):
    """A linear map whose weight is packed into integers under a name of its own, as GPTQ's layers do."""

    def __init__(self, weight_name: str) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.register_buffer(weight_name, torch.ones(3, dtype=torch.int32))


class Router(nn.Linear):
    """What expert layers call for the scores of the experts."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        return scores.softmax(-1), scores


class Groups(nn.Linear):
    """A matrix for each of two groups of features."""

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (2, self.in_features)).unsqueeze(-2)
        return (groups @ self.weight.view(2, -1, self.in_features).mT).flatten(-3)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


def names(maps: list[LinearMap]) -> list[str]:
    return [m.name for m in maps]


def test_a_linear_layer_keeps_its_shape_and_weight() -> None:
    model = nn.Sequential(nn.Linear(3, 5))
    (found,) = find_linear_maps(model)
    assert (found.name, found.d_in, found.d_out, found.transposed) == ("0", 3, 5, False)
    assert found.weight is model[0].weight
    assert found.modules == (model[0],)


def test_conv1d_is_a_transposed_map() -> None:
    model = nn.Sequential(Conv1D(nf=5, nx=3))
    (found,) = find_linear_maps(model)
    assert (found.d_in, found.d_out, found.transposed) == (3, 5, True)
    assert found.weight is model[0].weight


def test_a_named_module_with_a_matrix_is_a_map() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Plain())
    assert names(find_linear_maps(model)) == ["0"]
    found = find_linear_maps(model, linear=["1"])[1]
    assert (found.name, found.d_in, found.d_out) == ("1", 3, 5)
    assert found.weight is model[1].weight


def test_a_linear_layer_that_returns_something_else_is_no_map() -> None:
    """Once probes of Llama 4, PhiMoE and DeepSeek-V4 stopped at their routers and grouped layers."""
    model = nn.ModuleList([nn.Linear(4, 6), Router(4, 6), Groups(4, 6), Noisy(4, 6)])
    assert names(find_linear_maps(model)) == ["0", "3"]
    assert names(find_linear_maps(model, linear=["1"])) == ["0", "1", "3"]
    assert set(other_parameters(model, find_linear_maps(model))) >= {"1.weight", "2.weight"}


@pytest.mark.parametrize("weight_name", ["weight", "qweight"])
def test_a_named_module_with_in_and_out_features_is_a_map_without_weight(weight_name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), Packed(weight_name))
    (_, found) = find_linear_maps(model, linear=["1"])
    assert (found.name, found.d_in, found.d_out, found.weight) == ("1", 4, 6, None)


def test_a_named_module_that_is_no_matrix_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match="'1'"):
        find_linear_maps(model, linear=["1"])


def test_include_and_exclude_are_shell_patterns_on_names() -> None:
    model = llama()
    queries = names(find_linear_maps(model, include=["*.q_proj"]))
    assert queries == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert names(find_linear_maps(model, include=["*.q_proj"], exclude=["*.0.*"])) == queries[1:]
    assert "lm_head" not in names(find_linear_maps(model, exclude=["lm_head"]))


@pytest.mark.parametrize("pattern", ["0", "0.*", "0.weight"])
def test_patterns_name_a_weight_by_its_own_name_or_its_layer_s(pattern: str) -> None:
    """Once a layer that was excluded by its name was no map any more, and got dense noise instead."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    maps = find_linear_maps(model, exclude=[pattern])
    assert names(maps) == ["1"]
    assert set(other_parameters(model, maps, exclude=[pattern])) == {"1.bias"}
    assert set(other_parameters(model, [], exclude=[pattern])) == {"1.weight", "1.bias"}
    assert names(find_linear_maps(model, include=[pattern])) == ["0"]
    assert set(other_parameters(model, [], include=[pattern])) == {"0.weight"}
    assert not other_parameters(model, [], include=[pattern], exclude=["*.weight"])


def test_frozen_layers_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    assert names(find_linear_maps(model)) == ["1"]
    assert set(other_parameters(model, find_linear_maps(model))) == {"0.bias", "1.bias"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_layers_are_maps_although_they_require_no_gradient(dtype: torch.dtype) -> None:
    """Once numbers of 8 bits were taken for weights to be read and written, without their scale."""
    model = nn.Sequential(nn.Linear(3, 5, bias=False))
    model[0].weight = nn.Parameter(torch.ones(5, 3).to(dtype), requires_grad=False)
    (found,) = find_linear_maps(model)
    assert (found.d_in, found.d_out, found.weight, found.dense_weight()) == (3, 5, None, None)
    model[0].weight.requires_grad_(dtype.is_floating_point)
    assert not other_parameters(model, [])


def test_a_module_used_twice_is_one_map() -> None:
    shared = nn.Linear(3, 3)
    (found,) = find_linear_maps(nn.Sequential(shared, nn.Tanh(), shared))
    assert found.modules == (shared,)


def test_two_modules_that_share_a_weight_are_one_map() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    (found,) = find_linear_maps(model)
    assert found.modules == (model[0], model[1])
    assert found.weight is model[0].weight


def test_layers_whose_weight_is_computed_are_maps_of_their_own() -> None:
    """Once they were taken for tied ones: each weight had the id of the one before, which was gone."""
    model = nn.Sequential(*(weight_norm(nn.Linear(4 + i, 5 + i)) for i in range(6)))
    maps = find_linear_maps(model)
    assert [(m.name, m.modules, m.d_in, m.weight) for m in maps] == [
        (str(i), (layer,), 4 + i, None) for i, layer in enumerate(model)
    ]


def test_a_tied_embedding_is_a_map_only_on_request() -> None:
    model = tied_llama()
    assert "lm_head" not in names(find_linear_maps(model))
    found = find_linear_maps(model, embeddings=True)[0]
    assert found.name == "model.embed_tokens"
    assert found.modules == (model.lm_head,)
    assert found.lookups == (model.model.embed_tokens,)
    assert (found.d_out, found.d_in) == (64, 32)


def test_an_untied_embedding_is_a_map_of_lookups_only() -> None:
    model = llama()
    found = find_linear_maps(model, embeddings=True)[0]
    assert (found.modules, found.lookups) == ((), (model.model.embed_tokens,))


def test_maps_and_other_parameters_are_all_parameters_once() -> None:
    model = tied_llama()
    maps = find_linear_maps(model)
    others = other_parameters(model, maps)
    ids = [id(m.weight) for m in maps] + [id(p) for p in others.values()]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_every_map_has_the_gradient_shape_it_states() -> None:
    model = llama()
    closure_of(model, token_batch())().backward()
    for found in find_linear_maps(model):
        assert found.weight is not None
        assert found.weight.grad is not None
        assert found.weight.grad.shape == (found.d_out, found.d_in)


def test_no_linear_layer_lists_what_was_found() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.Embedding(4, 3), nn.LayerNorm(3))
    with pytest.raises(NoLinearLayers, match=r"2 LayerNorm, 1 Embedding"):
        find_linear_maps(model)


def test_no_linear_layer_left_by_the_patterns_is_an_error() -> None:
    with pytest.raises(NoLinearLayers, match="1 Linear"):
        find_linear_maps(nn.Sequential(nn.Linear(2, 2)), include=["nothing"])
