"""Language models of several families: every linear layer is found, moved, and left alone by probes."""

import pytest
import torch

from zoft.optim import AGZO, ZOAct
from zoft.optim.layers import find_linear_maps

from .models import ARCHITECTURES, changed, closure_of, snapshot, token_batch


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_layers_are_found(name: str) -> None:
    build, expected = ARCHITECTURES[name]
    assert sorted(m.name for m in find_linear_maps(build())) == sorted(expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_and_orientation_are_those_of_the_activations(name: str) -> None:
    model = ARCHITECTURES[name][0]()
    optimizer = AGZO(model)
    optimizer.estimate(closure_of(model, token_batch()))
    for m in optimizer.maps:
        assert m.weight is not None
        assert m.weight.shape == ((m.d_in, m.d_out) if m.transposed else (m.d_out, m.d_in))
        assert optimizer.bases[m.name].shape == (m.d_in, 1)
    assert all(m.transposed for m in optimizer.maps) == (name == "gpt2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_agzo_step_writes_every_linear_layer_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    build, expected = ARCHITECTURES[name]
    model = build().to(dtype)
    optimizer, closure = AGZO(model, lr=0.1, eps=0.01), closure_of(model, token_batch())
    before = snapshot(model)
    optimizer.estimate(closure)
    assert changed(model, before) == set()
    optimizer.step()
    assert changed(model, before) == {f"{layer}.weight" for layer in expected}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_zo_act_step_moves_every_layer_but_the_head_and_no_weight(name: str) -> None:
    build, expected = ARCHITECTURES[name]
    model = build()
    optimizer, closure = ZOAct(model, lr=0.1, eps=0.01), closure_of(model, token_batch())
    before = snapshot(model)
    with torch.no_grad():
        start = float(closure())
        optimizer.step(closure)
        assert float(closure()) != start
    assert changed(model, before) == set()
    assert set(optimizer.coefficients) == set(expected) - {"lm_head"}
    assert all(bool(c.any()) for c in optimizer.coefficients.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_update_is_minus_lr_times_the_estimate(name: str) -> None:
    model = ARCHITECTURES[name][0]()
    optimizer = AGZO(model, lr=0.1, eps=0.01)
    optimizer.estimate(closure_of(model, token_batch()))
    assert optimizer._estimate is not None
    expected = {
        f"{m.name}.weight": optimizer._estimate.factors[m.name] @ optimizer.bases[m.name].t() for m in optimizer.maps
    }
    transposed = {f"{m.name}.weight" for m in optimizer.maps if m.transposed}
    before = snapshot(model)
    optimizer.step()
    for parameter, delta in expected.items():
        moved = snapshot(model)[parameter] - before[parameter]
        torch.testing.assert_close(
            moved, -0.1 * (delta.t() if parameter in transposed else delta), rtol=1e-3, atol=1e-6
        )
