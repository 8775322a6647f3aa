"""A probe computes with moved weights, and moves none."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from zoft.optim import LOZO, MeZO, ZeroOrder
from zoft.optim.layers import find_linear_maps, other_parameters
from zoft.optim.noise import normal
from zoft.optim.probe import Direction, SideBranches, lent, shifted

from .models import ARCHITECTURES, VOCABULARY, changed, snapshot, token_batch

SCALE = 0.3


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales what it reads, as Gemma's does."""

    def forward(self, ids: Tensor) -> Tensor:
        return 5.0 * super().forward(ids)


class OffsetEmbedding(nn.Embedding):
    """An embedding that reads two rows further on, as OPT's positions do."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


class Nested(nn.Module):
    """A module that holds a parameter which its child holds as well, as the heads of BERT and RoBERTa do."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 4)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x)


def tied(embedding: Callable[[int, int], nn.Embedding]) -> nn.Sequential:
    model = nn.Sequential(embedding(9, 4), nn.Tanh(), nn.Linear(4, 9, bias=False), nn.Tanh(), nn.Linear(9, 3))
    model[2].weight = model[0].weight
    return model


def called_twice() -> nn.Sequential:
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.Tanh(), shared)


TOKENS = torch.arange(6).view(2, 3)
FEATURES = normal((0, "x"), (2, 3, 4))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6)), FEATURES),
    "conv1d": (lambda: nn.Sequential(Conv1D(nf=6, nx=4)), FEATURES),
    "called twice": (called_twice, FEATURES),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), TOKENS),
    "tied head": (lambda: tied(nn.Embedding), TOKENS),
    "scaled embedding": (lambda: tied(ScaledEmbedding), TOKENS),
    "offset embedding": (lambda: tied(OffsetEmbedding), TOKENS),
    "nested": (Nested, FEATURES),
}


def low_rank_direction(model: nn.Module, rank: int = 2) -> tuple[SideBranches, Direction]:
    maps = find_linear_maps(model, embeddings=True)
    branches = SideBranches(maps)
    branches.bases = {m.name: normal((1, m.name), (m.d_in, rank)) for m in maps}
    direction = Direction((2,))
    for m in maps:
        direction.left(m, branches.bases[m.name])
    return branches, direction


def move_weights(branches: SideBranches, direction: Direction, scale: float) -> None:
    for m in branches.maps:
        delta = scale * direction.factors[m.name] @ branches.bases[m.name].t()
        assert m.weight is not None
        m.weight.data += delta.t() if m.transposed else delta


@torch.no_grad()
def assert_side_branches_are_moved_weights(model: nn.Module, forward: Callable[[], Tensor], rank: int = 2) -> None:
    branches, direction = low_rank_direction(model, rank)
    before, base = snapshot(model), forward()
    branches.factors = {name: SCALE * factor for name, factor in direction.factors.items()}
    with branches.attached():
        probed = forward()
    assert changed(model, before) == set()
    assert torch.equal(forward(), base)
    move_weights(branches, direction, SCALE)
    moved = forward()
    assert not torch.allclose(moved, base, atol=1e-2)
    torch.testing.assert_close(probed, moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_side_branches_compute_what_moved_weights_would(name: str) -> None:
    build, x = MODELS[name]
    model = build()
    assert_side_branches_are_moved_weights(model, lambda: model(x))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("large", [0, 1 << 30], ids=["large", "small"])
def test_large_and_small_activations_are_computed_alike(rank: int, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoft.optim.probe.LARGE", large)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    assert_side_branches_are_moved_weights(model, lambda: model(FEATURES), rank)


def test_other_gradients_pass_through_side_branches() -> None:
    """The backward pass of what the layer ends with reads its output, which a change in place would have replaced."""

    class Squashed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid()

    model, x = nn.Sequential(Squashed(4, 6)), FEATURES.clone().requires_grad_()
    branches, direction = low_rank_direction(model)
    branches.factors = direction.factors
    (expected,) = torch.autograd.grad((model(x) + x @ branches.bases["0"] @ direction.factors["0"].t()).sum(), x)
    with branches.attached():
        (found,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(found, expected)


class Keeping(nn.Linear):
    """A layer that computes its output once."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept = super().forward(x)
        return self.kept


class Spreading(nn.Linear):
    """A layer whose output is one row of memory for all places."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :1]).expand(-1, x.shape[1], -1)


@pytest.mark.parametrize("kind", [Keeping, Spreading])
def test_outputs_that_are_not_the_hooks_to_change(kind: type[nn.Linear]) -> None:
    layer = kind(4, 6)
    model = nn.Sequential(layer)
    branches, direction = low_rank_direction(model)
    branches.factors = direction.factors
    with torch.no_grad():
        before = model(FEATURES).clone()
        with branches.attached():
            probed = model(FEATURES)
        assert torch.equal(model(FEATURES), before)
    added = FEATURES @ branches.bases["0"] @ direction.factors["0"].t()
    torch.testing.assert_close(probed, before + added)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_side_branches_compute_what_moved_weights_would_in_language_models(name: str) -> None:
    model, batch = ARCHITECTURES[name][0](), token_batch()
    del batch["labels"]
    assert_side_branches_are_moved_weights(model, lambda: model(**batch).logits)


@torch.no_grad()
def assert_loans_are_moved_parameters(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    parameters = other_parameters(model, [])
    before, base = snapshot(model), forward()
    pointers = [p.data_ptr() for p in model.parameters()]
    with lent(model, parameters, SCALE, (7,)) as used:
        probed = forward()
    assert used == set(parameters)
    assert changed(model, before) == set()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    for name, parameter in parameters.items():
        parameter.data = shifted(parameter.data, SCALE, (7, name))
    moved = forward()
    assert not torch.allclose(moved, base, atol=1e-2)
    torch.testing.assert_close(probed, moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_lent_parameters_compute_what_moved_parameters_would(name: str) -> None:
    build, x = MODELS[name]
    model = build()
    assert_loans_are_moved_parameters(model, lambda: model(x))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lent_parameters_compute_what_moved_parameters_would_in_language_models(name: str) -> None:
    model, batch = ARCHITECTURES[name][0](), token_batch()
    del batch["labels"]
    assert_loans_are_moved_parameters(model, lambda: model(**batch).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_text_is_generated_by_the_moved_model(name: str) -> None:
    """With a cache, token by token: what is generated inside is what moved weights generate, not what the base does."""
    model, prompt = ARCHITECTURES[name][0](), token_batch(batch=4, length=4)["input_ids"]
    generate = partial(model.generate, prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    base = generate()
    branches, direction = low_rank_direction(model)
    branches.factors = {name: SCALE * factor for name, factor in direction.factors.items()}
    with branches.attached():
        probed = generate()
    parameters = other_parameters(model, [])
    with lent(model, parameters, SCALE, (7,)):
        loaned = generate()
    assert torch.equal(generate(), base)
    before = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = shifted(parameter.data, SCALE, (7, name))
    assert torch.equal(generate(), loaned) and not torch.equal(loaned, base)
    for name, parameter in parameters.items():
        parameter.data = before[name]
    move_weights(branches, direction, SCALE)
    assert torch.equal(generate(), probed) and not torch.equal(probed, base)


def test_shifted_is_the_sum_in_the_tensors_own_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensor = normal((0, "t"), (5, 3)).to(dtype)
        expected = (tensor.double() + 0.5 * normal((1,), (5, 3)).double()).to(dtype)
        torch.testing.assert_close(shifted(tensor, 0.5, (1,)), expected)


@pytest.mark.parametrize("name", ["linear", "tied head", "nested"])
def test_originals_are_put_back_when_the_forward_raises(name: str) -> None:
    model = MODELS[name][0]()
    before = snapshot(model)
    wrong = torch.full((2, 3), 99) if name == "tied head" else torch.ones(2, 5)
    with pytest.raises((RuntimeError, IndexError)), lent(model, other_parameters(model, []), SCALE, (7,)):
        model(wrong)
    assert changed(model, before) == set()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["linear", "tied head", "nested"])
def test_originals_are_put_back_when_the_forward_is_interrupted(name: str) -> None:
    """Once Ctrl-C left the module that was running its moved weights: torch calls no hook then."""
    model = MODELS[name][0]()
    before = snapshot(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lent(model, other_parameters(model, []), SCALE, (7,)):
        [*model.modules()][-1].register_forward_pre_hook(interrupt)  # after the loan's own
        model(MODELS[name][1])
    assert changed(model, before) == set()


def test_side_branches_are_detached_when_the_forward_raises() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    branches, _ = low_rank_direction(model)
    with pytest.raises(RuntimeError), branches.attached():
        model(torch.ones(2, 5))
    assert not model[0]._forward_hooks


def test_an_input_changed_in_place_is_projected_anew() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6)), FEATURES.clone()
    branches, direction = low_rank_direction(model)
    branches.factors = direction.factors
    with torch.no_grad(), branches.attached():
        model(x)
        x.copy_(normal((3, "other"), tuple(x.shape)))
        probed = model(x)
        expected = model(x.clone())
    torch.testing.assert_close(probed, expected)


def test_layers_that_share_input_and_basis_project_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 5)])
    branches, direction = low_rank_direction(model, rank=2)
    branches.bases["1"] = branches.bases["0"]
    branches.factors = direction.factors

    def operations(inputs: list[Tensor]) -> int:
        with torch.no_grad(), branches.attached(), FlopCounterMode(display=False) as counter:
            for layer, x in zip(model, inputs, strict=True):
                layer(x)
        return counter.get_total_flops()

    saved = operations([FEATURES.clone(), FEATURES.clone()]) - operations([FEATURES, FEATURES])
    assert saved == 2 * 6 * 4 * 2  # one product of [6, 4] and [4, 2]


@pytest.mark.parametrize("method", [MeZO, LOZO])
def test_parameters_read_past_their_module_stay_still_and_are_reported_once(method: type[ZeroOrder]) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0].square().mean()

    model, x = Attention(), normal((0, "x"), (2, 3, 8))
    model.attention.train()
    before, optimizer = snapshot(model), method(model, lr=0.1)
    with pytest.warns(UserWarning, match="not read through their own module") as caught:
        for _ in range(3):
            optimizer.step(lambda: model(x))
    assert len(caught) == 1
    assert changed(model, before) == {"attention.in_proj_weight", "attention.in_proj_bias"}


def test_every_stream_has_a_name_of_its_own() -> None:
    same_shape = nn.Sequential(nn.Linear(VOCABULARY, VOCABULARY), nn.Linear(VOCABULARY, VOCABULARY))
    _, direction = low_rank_direction(same_shape)
    first, second = direction.factors["0"], direction.factors["1"]
    assert abs(float((first * second).mean())) < 4 / first.numel() ** 0.5  # four standard errors
