"""The gradient's energy in the activations' leading directions."""

import pytest
import torch

from optim.models import closure_of, gpt2, llama, token_batch
from zoft.bench import captured_energy
from zoft.bench.gradient import true_gradients
from zoft.optim import AGZO


@pytest.mark.parametrize("make", [llama, gpt2])
def test_it_is_what_align_captures(make: object) -> None:
    """At full rank nothing is missed; at rank 1 it is the share in the bases that AGZO takes from the same pass."""
    model = make()  # type: ignore[operator]
    closure = closure_of(model, token_batch())
    found = captured_energy(model, closure, (1, 64))
    assert found[64] == pytest.approx(1, abs=1e-4)

    optimizer, gradients = AGZO(model, power_steps=None), true_gradients(model, closure)
    optimizer.estimate(closure)
    caught = total = 0.0
    for layer in optimizer.maps:
        gradient = gradients[id(layer.weight)]
        gradient = gradient.t() if layer.transposed else gradient
        total += float(gradient.square().sum())
        caught += float((gradient @ optimizer.bases[layer.name]).square().sum())
    assert found[1] == pytest.approx(caught / total, rel=1e-3)
    assert torch.is_grad_enabled()
