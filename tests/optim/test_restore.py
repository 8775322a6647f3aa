"""Estimating leaves no trace: not in weights or buffers, not in random states, not in hooks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoft.optim import MeZO
from zoft.optim.noise import normal

from .models import ARCHITECTURES, changed, closure_of, llama, mlp, opt, snapshot, token_batch
from .table import METHODS

LOW_RANK = [name for name in METHODS if not name.startswith("MeZO")]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "tied llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_changes_no_parameter_and_no_buffer(method: str, architecture: str, dtype: torch.dtype) -> None:
    model = ARCHITECTURES[architecture][0]().to(dtype)
    optimizer, closure = METHODS[method](model, lr=0.1, eps=0.1), closure_of(model, token_batch())
    attached = hooks(model)
    before, pointers = snapshot(model), [p.data_ptr() for p in model.parameters()]
    for _ in range(2):
        optimizer.estimate(closure)
    assert changed(model, before) == set()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert hooks(model) == attached
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", LOW_RANK)
def test_no_weight_of_a_linear_layer_is_written_while_probing(method: str) -> None:
    model, batch = llama(), token_batch()
    optimizer = METHODS[method](model, lr=0.1)
    weights = [m.weight for m in optimizer.maps if m.weight is not None]
    assert len(weights) >= 14
    seen: list[list[tuple[int, int]]] = []

    def look() -> None:
        seen.append([(w._version, w.data_ptr()) for w in weights])

    def closure() -> Tensor:
        look()
        loss = model(**batch).loss
        look()
        return loss

    look()
    optimizer.estimate(closure)
    look()
    assert len(seen) >= 6
    assert all(state == seen[0] for state in seen)


@pytest.mark.parametrize("method", METHODS)
def test_weights_survive_a_forward_that_raises_and_training_goes_on(method: str) -> None:
    model, batch, calls = llama(), token_batch(), [0]
    optimizer = METHODS[method](model, lr=1e-3)
    before, attached = snapshot(model), hooks(model)

    def out_of_memory(module: nn.Module, args: Any, y: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:  # in the probe, after half of the layers
            raise MemoryError

    handle = model.model.layers[0].register_forward_hook(out_of_memory)
    with pytest.raises(MemoryError):
        optimizer.step(closure_of(model, batch))
    handle.remove()
    assert changed(model, before) == set()
    assert hooks(model) == attached
    optimizer.step(closure_of(model, batch))
    assert optimizer.counters.steps == 1


class Noisy(nn.Module):
    """A model with dropout that remembers which masks it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.dropout, self.masks = mlp(), nn.Dropout(0.5), []

    def forward(self) -> Tensor:
        mask = self.dropout(torch.ones(12, 10))
        self.masks.append(mask)
        return self.layers(mask * normal((0, "x"), (12, 10))).square().mean()


@pytest.mark.parametrize("method", METHODS)
def test_all_probes_of_a_step_see_the_same_dropout_mask_and_steps_do_not(method: str) -> None:
    model = Noisy().train()
    optimizer = METHODS[method](model, lr=1e-3)
    with torch.random.fork_rng():
        optimizer.step(model)
        first = list(model.masks)
        optimizer.step(model)
        second = model.masks[len(first) :]
    assert len(first) >= 2
    assert all(torch.equal(mask, first[0]) for mask in first)
    assert all(torch.equal(mask, second[0]) for mask in second)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("method", METHODS)
def test_global_random_state_is_as_if_the_closure_had_been_called_once(method: str) -> None:
    model = opt().train()
    optimizer, closure = METHODS[method](model, lr=1e-3), closure_of(model, token_batch())
    with torch.random.fork_rng():
        torch.manual_seed(7)
        closure()
        once = torch.get_rng_state()
        torch.manual_seed(7)
        optimizer.step(closure)
        assert torch.equal(torch.get_rng_state(), once)


def test_the_forward_runs_without_autograd() -> None:
    model = mlp()
    enabled: list[bool] = []

    def closure() -> Tensor:
        enabled.append(torch.is_grad_enabled())
        return model(torch.ones(2, 10)).mean()

    MeZO(model).step(closure)
    assert enabled == [False, False]
    assert torch.is_grad_enabled()
