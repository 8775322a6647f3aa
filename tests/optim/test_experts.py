"""Experts that share a three-dimensional weight are linear maps of their own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Llama4TextConfig,
    PhimoeConfig,
)

from zoft.bench.gradient import gradient_of, slope, true_gradients
from zoft.optim import AGZO, LOZO, Guided, Loss, MeZO, ZOAct, cross_entropy
from zoft.optim.experts import Expert, find_experts
from zoft.optim.layers import find_linear_maps

from .mixtures import CONFIGS, model_of
from .models import GROUPED, build, changed, closure_of, snapshot, token_batch, token_losses

OTHERS: dict[str, Callable[..., Any]] = {  # whose routers are linear layers with a forward of their own
    "Llama 4": lambda: Llama4TextConfig(**GROUPED, num_local_experts=4, intermediate_size_mlp=48, head_dim=8),
    "PhiMoE": lambda: PhimoeConfig(**GROUPED, num_local_experts=4),
}
every_model = pytest.mark.parametrize("name", CONFIGS)
each_way = pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(3, 8)).logits


@each_way
@every_model
def test_taken_apart_a_model_computes_the_same(name: str, way: str) -> None:
    model = model_of(name, way)
    expected = logits(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(called: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Sequence[Tensor], y: Tensor) -> None:
            seen[called] = args[0], y

        return see

    experts = dict(find_experts(model))
    assert len(experts) == 2 * 2 * 4  # layers, matrices, experts
    assert torch.equal(logits(model), expected)
    handles = [expert.register_forward_hook(note(called)) for called, expert in experts.items()]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert seen
    for called, (x, y) in seen.items():
        matrix = experts[called].fused[experts[called].index]
        torch.testing.assert_close(y, x @ (matrix if experts[called].transposed else matrix.t()))
    for handle in handles:
        handle.remove()
    seen.clear()
    assert torch.equal(logits(model), expected)
    assert not seen


@every_model
def test_weights_are_parts_of_the_model_s_own(name: str) -> None:
    model = model_of(name)
    maps = [m for m in find_linear_maps(model, experts=True) if m.fused is not None]
    assert [m.name for m in maps] == [called for called, _ in find_experts(model)]
    assert not any(m.fused is not None for m in find_linear_maps(model))
    for layer in maps:
        assert layer.weight is not None
        layer.weight.fill_(7.0)
        assert layer.dense_weight() is not None
        assert layer.dense_weight().shape == (layer.d_out, layer.d_in)  # type: ignore[union-attr]
    fused = {id(m.parameter): m.parameter for m in maps}
    assert len(fused) == 4
    assert all(bool((p == 7).all()) for p in fused.values() if p is not None)


@each_way
@every_model
@pytest.mark.parametrize("method", [partial(AGZO, two_sided=True), LOZO], ids=["AGZO", "LOZO"])
def test_the_projected_gradient_is_that_of_autograd(method: Callable[..., Any], name: str, way: str) -> None:
    """Through the experts alone: nothing before them moves, so no token changes its experts in the first layer."""
    model = model_of(name, way)
    optimizer = method(model, eps=1e-3, include=["*.layers.1.*.experts.*"], others="frozen")
    closure = partial(token_losses, model, token_batch(batch=2, length=6))
    optimizer.estimate(closure)
    (found,) = optimizer.projected_gradients
    estimate = optimizer.take_estimate()
    for name_of, factor in estimate.factors.items():
        estimate.factors[name_of] = factor / found * getattr(optimizer.estimator, "scale", 1.0)  # the direction itself
    assert len(estimate.factors) > 2
    assert found == pytest.approx(slope(optimizer, estimate, true_gradients(model, lambda: closure().mean())), rel=0.01)


def test_gradients_of_experts_are_parts_of_the_whole_s() -> None:
    model = model_of("GPT-OSS")
    gradients = true_gradients(model, closure_of(model, token_batch()))
    for layer in find_linear_maps(model, experts=True):
        gradient = gradient_of(layer, gradients)
        assert gradient is not None
        assert gradient.shape == (layer.d_out, layer.d_in)
        if layer.fused is not None:
            stored = gradients[id(layer.fused)][layer.part]
            assert torch.equal(gradient, stored.t() if layer.transposed else stored)


@each_way
@every_model
def test_a_step_moves_the_experts_that_saw_tokens_by_their_low_rank_updates(name: str, way: str) -> None:
    model = model_of(name, way)
    optimizer, before = AGZO(model, lr=1e-2, include=["*.experts.*"]), snapshot(model)
    optimizer.step(closure_of(model, token_batch(batch=1, length=5)))
    still = [m for m in optimizer.maps if m.name not in optimizer.bases]
    assert 0 < len(still) < len(optimizer.maps)
    for layer in optimizer.maps:
        assert layer.weight is not None
        path = next(n for n, p in model.named_parameters() if p is layer.fused)
        change = layer.weight - before[path][layer.part]
        singular = torch.linalg.svdvals(change)
        if layer in still:
            assert not change.any()
        else:
            assert singular[0] > 0
            assert singular[1] < 1e-3 * singular[0]


def test_experts_are_written_where_the_model_has_moved_to() -> None:
    """Once they were written where they lay when the optimizer was made, and the model's own never moved."""
    moved = []
    for early in (True, False):
        model = model_of("Mixtral")
        if early:
            model.double()
        optimizer, names = AGZO(model, lr=1e-2, include=["*.experts.*"]), dict(model.named_parameters())
        model.double()
        before = snapshot(model)
        optimizer.step(closure_of(model, token_batch()))
        assert {"down_proj", "gate_up_proj"} == {name.rpartition(".")[2] for name in changed(model, before)}
        moved.append({name: parameter - before[name] for name, parameter in names.items()})
    for name, change in moved[0].items():
        torch.testing.assert_close(moved[1][name], change)


def test_what_is_no_expert_s_matrix_alone_is_dense() -> None:
    model = model_of("GPT-OSS")
    optimizer = AGZO(model, others="gaussian")
    fused = {id(m.fused) for m in optimizer.maps if m.fused is not None}
    assert len(fused) == 4
    assert not fused & {id(p) for p in optimizer.dense.values()}
    assert any("experts.gate_up_proj_bias" in name for name in optimizer.dense)
    assert fused <= {id(p) for p in MeZO(model).dense.values()}


@each_way
@every_model
def test_coefficients_of_experts_are_beside_their_weights(name: str, way: str) -> None:
    """The model with them computes what it would with their products in the weights."""
    model, start = model_of(name, way), logits(model_of(name, way))
    optimizer, before = ZOAct(model, lr=0.1, rank=2, include=["*.experts.*"]), snapshot(model)
    optimizer.step(closure_of(model, token_batch()))
    learned = logits(model)
    assert changed(model, before) == set() and not torch.allclose(learned, start, atol=1e-2)
    optimizer.branches.detach()
    assert torch.equal(logits(model), start)
    for layer in optimizer.branches.active:
        assert layer.weight is not None
        update = optimizer.coefficients[layer.name] @ optimizer.bases[layer.name].t()
        layer.weight.add_(update.t() if layer.transposed else update)
    torch.testing.assert_close(logits(model), learned, rtol=1e-4, atol=1e-5)


def test_guided_does_not_reach_experts() -> None:
    assert not any(m.fused is not None for m in Guided(model_of("Mixtral")).maps)


@each_way
def test_an_error_in_the_forward_closes_what_was_open(way: str) -> None:
    model = model_of("Mixtral", way)
    expected = logits(model)
    optimizer = AGZO(model)
    (experts,) = {m.modules[0] for m in optimizer.maps if m.name == "model.layers.0.mlp.experts.down_proj.0"}
    assert isinstance(experts, Expert)
    handle = experts.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), expected) and model.config._experts_implementation == way
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert changed(model, before) == set()
    assert torch.equal(logits(model), expected)


def test_a_forward_that_was_interrupted_leaves_nothing_to_the_next() -> None:
    """Once the experts' side branches were added twice after Ctrl-C: torch calls no hook then, which would close."""
    model = model_of("Mixtral", "batched_mm")
    optimizer = ZOAct(model, lr=0.1, include=["*.experts.*"])
    optimizer.step(closure_of(model, token_batch()))
    learned = logits(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = optimizer.maps[-1].modules[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), learned) and model.config._experts_implementation == "batched_mm"


class Gathering(nn.Module):
    """Experts that copy their matrices, in a way of their own."""

    num_experts, is_transposed = 2, False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.weight[torch.tensor([0, 1])], x.unsqueeze(-1)).squeeze(-1)


def test_gathered_weights_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), Gathering()), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"gathered before they are used: exclude=\['\*experts\*'\]"):
        AGZO(model).step(lambda: model(x).square().mean())
    AGZO(model, exclude=["1.*"]).step(lambda: model(x).square().mean())


def test_a_model_with_coefficients_generates() -> None:
    """On an accelerator transformers takes batched_mm for that, which was refused."""
    model, prompt = model_of("Mixtral", "batched_mm"), torch.arange(3, 9).view(1, 6)
    optimizer = ZOAct(model, lr=0.1, include=["*.experts.*"])
    optimizer.step(closure_of(model, token_batch()))
    cached, anew = (model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, anew) and model.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_a_step_of_each_kind(name: str) -> None:
    """Guided once took GPT-OSS's experts, which join the stream, for a norm, and called them with rows."""
    model, batch = build((CONFIGS | OTHERS)[name]()), token_batch()

    def closure() -> Loss:
        return cross_entropy(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])

    for method in (AGZO, ZOAct, Guided):
        optimizer, start = method(model, lr=1e-2), logits(model)
        assert not any("router" in m.name for m in optimizer.maps if name in OTHERS)
        optimizer.step(closure)
        assert not torch.equal(logits(model), start)
        optimizer.branches.detach()
