"""Half-precision weights whose products are taken in float32: the same layer, rounded once."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from torch import Tensor, nn

from zoft.optim import AGZO, Guided, MeZO, ZeroOrder, ZOAct, cross_entropy, products
from zoft.optim.layers import as_linear_map
from zoft.optim.probe import SideBranches
from zoft.optim.products import FEW, WideLinear, float32_is_quicker, wide_transposed, widen
from zoft.optim.transpose import transposed_product

from .models import llama, snapshot, token_batch

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
TOGETHER = pytest.mark.parametrize("together", [1 << 20, 100, 1], ids=["at once", "in parts", "row by row"])


def layer_of(dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 17, bias=bias, dtype=dtype)


def wide(model: nn.Module) -> nn.Module:
    widen(model)
    assert any(isinstance(module, WideLinear) for module in model.modules())
    return model


@HALVES
@TOGETHER
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_output_is_the_float32_one_rounded(
    dtype: torch.dtype, together: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "TOGETHER", together)
    layer, x = layer_of(dtype, bias), torch.randn(3, 5, 24).to(dtype)
    exact = copy.deepcopy(layer).float()(x.float())
    with torch.no_grad():
        found = wide(layer)(x)
    assert found.dtype == dtype
    unit = torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert ((found.float() - exact).abs() <= 0.5 * unit + 1e-6).all()


@HALVES
@TOGETHER
def test_the_transposed_product_is_that_of_the_float32_weight(
    dtype: torch.dtype, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "TOGETHER", together)
    layer, error = layer_of(dtype), torch.randn(6, 17)
    exact = error @ layer.weight.detach().float()
    torch.testing.assert_close(wide_transposed(error, layer.weight.detach()), exact)
    linear = as_linear_map("layer", wide(layer))
    assert linear is not None and linear.wide
    torch.testing.assert_close(transposed_product(linear, error), exact)  # in half precision it would be rounded


def test_other_layers_stay_as_they_are() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    patched = nn.Linear(2, 2, dtype=torch.bfloat16)
    patched.forward = nn.Identity().forward  # type: ignore[method-assign]
    kinds = [nn.Linear(2, 2), Scaled(2, 2, dtype=torch.bfloat16), nn.Embedding(2, 2, dtype=torch.bfloat16), patched]
    widen(nn.ModuleList(kinds))
    assert [type(module) for module in kinds] == [nn.Linear, Scaled, nn.Embedding, nn.Linear]


def test_autograd_and_autocast_see_a_plain_layer() -> None:
    plain, x = layer_of(torch.bfloat16), torch.randn(4, 24, dtype=torch.bfloat16)
    layer = wide(copy.deepcopy(plain))
    for one in (plain, layer):
        one(x).float().square().sum().backward()
    assert isinstance(layer, nn.Linear) and plain.weight.grad is not None and layer.weight.grad is not None
    assert torch.equal(plain.weight.grad, layer.weight.grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), layer(x))


def test_the_model_keeps_its_parameters_and_can_be_copied() -> None:
    model = llama().bfloat16()
    before, names = snapshot(model), [*model.state_dict()]
    wide(model)
    assert [*model.state_dict()] == names
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    other, batch = copy.deepcopy(model), token_batch()
    with torch.no_grad():
        assert torch.equal(other(**batch).loss, model(**batch).loss)


def test_a_quantized_weight_is_made_half_precision_first() -> None:
    class Packed(Tensor):
        def dequantize(self) -> Tensor:
            return self.as_subclass(Tensor) * 2

    layer, x = layer_of(torch.bfloat16), torch.randn(FEW, 24, dtype=torch.bfloat16)
    exact = F.linear(x.float(), 2 * layer.weight.detach().float(), layer.bias.detach().float())
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(wide(layer)(x).as_subclass(Tensor).float(), exact, rtol=2**-8, atol=1e-5)


def test_offloaded_layers_are_widened_too() -> None:
    batch, model = token_batch(), llama().bfloat16()
    with torch.no_grad():
        expected = wide(copy.deepcopy(model))(**batch).logits
        found = wide(cpu_offload(model, execution_device=torch.device("cpu")))(**batch).logits
    assert torch.equal(found, expected)


@TOGETHER
@pytest.mark.parametrize("tokens", [5, 1], ids=["many rows", "few"])
@pytest.mark.parametrize("shape", [(17, 1), (17, 3), (4, 17, 3)], ids=["rank 1", "rank 3", "per example"])
def test_side_branches_are_added_in_float32(
    shape: tuple[int, ...], tokens: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "TOGETHER", together)
    layer, x = wide(layer_of(torch.bfloat16)), torch.randn(4, tokens, 24, dtype=torch.bfloat16)
    linear = as_linear_map("layer", layer)
    assert linear is not None
    branches = SideBranches([linear])
    branches.bases["layer"], branches.factors = torch.randn(24, shape[-1]), {"layer": torch.randn(shape)}
    branches.tokens.see(layer, (x,), {})
    with torch.no_grad(), branches.attached():
        found = layer(x).float()
    exact = copy.deepcopy(layer).float()(x.float()) + x.float() @ branches.bases["layer"] @ branches.factors["layer"].mT
    torch.testing.assert_close(found, exact, rtol=2**-7, atol=2**-6)


OPTIMIZERS: dict[str, Callable[[nn.Module], ZeroOrder]] = {
    "mezo": lambda model: MeZO(model, lr=1e-2, eps=0.1),
    "agzo": lambda model: AGZO(model, lr=1e-2, eps=0.3),
    "agzo, folding": lambda model: AGZO(model, lr=1e-2, eps=0.3, fold_every=2),
    "agzo, batching": lambda model: AGZO(model, lr=1e-2, eps=0.3, probe_batching=True),
    "zo-act": lambda model: ZOAct(model, lr=1e-2, eps=0.3),
    "guided": lambda model: Guided(model, lr=1e-3),
    "guided, attention": lambda model: Guided(model, lr=1e-3, attention=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_methods_go_the_way_they_go_in_float32(name: str) -> None:
    def run(model: nn.Module) -> tuple[list[float], list[float], dict[str, Tensor]]:
        batch, losses = token_batch(), []

        def closure() -> Any:
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return cross_entropy(logits, batch["labels"])

        optimizer = OPTIMIZERS[name](model)
        for _ in range(3):
            losses.append(float(optimizer.step(closure)))
        optimizer.estimate(closure)
        assert optimizer._estimate is not None
        moves = {name: c @ optimizer.bases[name].t() for name, c in optimizer._estimate.factors.items()}
        return losses, optimizer.projected_gradients, moves

    half = llama().bfloat16()
    exact, found = run(copy.deepcopy(half).float()), run(wide(half))
    assert found[0] == pytest.approx(exact[0], rel=2e-3)
    assert found[1] == pytest.approx(exact[1], abs=0.05)
    for layer, move in exact[2].items() if "guided" in name else ():
        assert F.cosine_similarity(found[2][layer].flatten(), move.flatten(), dim=0) > 0.995


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    float32_is_quicker.cache_clear()
    times = iter(range(100))
    monkeypatch.setattr(products.time, "perf_counter", lambda: float(next(times)))
    assert not float32_is_quicker(torch.bfloat16)  # both take one unit
    next(times)
    left = next(times)
    assert not float32_is_quicker(torch.bfloat16)
    assert next(times) == left + 1
    float32_is_quicker.cache_clear()
    ways = {F.linear: 3.0, products.wide_product: 1.0}
    monkeypatch.setattr(products, "_seconds", lambda way, *_: ways[way])
    assert float32_is_quicker(torch.bfloat16)
    float32_is_quicker.cache_clear()
