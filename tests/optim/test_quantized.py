"""Guided training of quantized weights: they are read unpacked, and stay as they are."""

from functools import partial
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.gguf.utils import GgufLinear

from zoft.optim import AGZO, Guided, Loss, cross_entropy

from .models import changed, llama, snapshot, token_batch


def loss_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Loss:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits, batch["labels"])


SCALE = 2**-6
How = Literal["tensors", "layers", "gguf"]


class PackedTensor(Tensor):
    """Eight-bit integers that know how to become numbers again, as the weights of some formats do."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor).float() * SCALE


class PackedLayer(nn.Module):
    """A layer that is no ``nn.Linear`` and has its integers under another name, as those of GPTQ and AWQ."""

    def __init__(self, whole: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = whole.shape
        self.register_buffer("qweight", whole.t().contiguous())

    def dequantize_weight(self) -> Tensor:
        return self.qweight.float() * SCALE

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dequantize_weight()


class GgufRows(GgufLinear):
    """Never takes the kernel that transformers fetches from the hub for up to eight rows."""

    def forward(self, x: Tensor) -> Tensor:
        return self._unpack_matmul(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


def gguf_layer(whole: Tensor) -> GgufLinear:
    """transformers' layer of packed blocks, of type Q8_0: a scale in half precision before every 32 integers."""
    layer = GgufRows(whole.shape[1], whole.shape[0], ggml_type=8)
    integers = whole.view(-1, 32).view(torch.uint8)
    scale = torch.full((len(integers), 1), SCALE, dtype=torch.float16).view(torch.uint8)
    layer.weight.data = torch.cat([scale, integers], 1).view(len(whole), -1)
    return layer


def pack(model: PreTrainedModel, how: How | None) -> None:
    """Round the weights of the blocks' linear layers to eight-bit integers, and keep them so, or as numbers."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and name != "lm_head":
            whole = (module.weight.data / SCALE).round().to(torch.int8)
            if how == "layers":
                model.set_submodule(name, PackedLayer(whole))
            elif how == "gguf":
                model.set_submodule(name, gguf_layer(whole))
            elif how == "tensors":
                module.weight = nn.Parameter(whole.as_subclass(PackedTensor), requires_grad=False)
                module.forward = lambda x, module=module: nn.functional.linear(x, module.weight.dequantize())
            else:
                module.weight.data = whole.float() * SCALE


@pytest.mark.parametrize("how", get_args(How))
def test_quantized_weights_are_read_unpacked(how: How) -> None:
    """The same estimates and training as with plain weights of the same values; nothing is written."""
    losses, coefficients = [], []
    for packed in (None, how):
        model = llama()
        pack(model, packed)
        optimizer = Guided(model, lr=1e-2)
        closure = partial(loss_of, model, token_batch())
        before = snapshot(model)
        losses.append([float(optimizer.step(closure) or 0) for _ in range(4)])
        coefficients.append(optimizer.coefficients)
        assert changed(model, before) == set()
    assert losses[1] == pytest.approx(losses[0]) and losses[0][-1] < losses[0][0]
    assert coefficients[0].keys() == coefficients[1].keys() and len(coefficients[0]) == 2 * 4
    for name, factor in coefficients[0].items():
        torch.testing.assert_close(coefficients[1][name], factor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", get_args(How))
def test_they_are_not_written(how: How) -> None:
    model = llama()
    pack(model, how)
    with pytest.raises(ValueError, match="quantized weight, which cannot be written"):
        AGZO(model)
