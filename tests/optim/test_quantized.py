"""Guided training of quantized weights: they are read unpacked, and stay as they are."""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zoft.optim import Guided, Loss, cross_entropy

from .models import changed, llama, snapshot, token_batch


def loss_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Loss:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits, batch["labels"])


class Packed(Tensor):
    """Eight-bit integers that know how to become numbers again, as quantized weights do."""

    SCALE = 0.02

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor).float() * Packed.SCALE


def pack(model: PreTrainedModel) -> None:
    """Quantize the blocks' linear layers in place; they compute with what they unpack."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                whole = (module.weight.data / Packed.SCALE).round().to(torch.int8)
                module.weight = nn.Parameter(whole.as_subclass(Packed), requires_grad=False)
                module.forward = lambda x, module=module: nn.functional.linear(x, module.weight.dequantize())


def test_quantized_weights_are_read_unpacked() -> None:
    """The same estimates and training as with plain weights of the same values; nothing is written."""
    losses, coefficients = [], []
    for packed in (False, True):
        model = llama()
        pack(model)
        if not packed:
            for module in model.model.layers.modules():
                if isinstance(module, nn.Linear):
                    module.weight = nn.Parameter(module.weight.dequantize())
                    del module.forward
        optimizer = Guided(model, lr=1e-2)
        closure = partial(loss_of, model, token_batch())
        before = snapshot(model)
        losses.append([float(optimizer.step(closure) or 0) for _ in range(4)])
        coefficients.append(optimizer.coefficients)
        assert changed(model, before) == set()
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert coefficients[0].keys() == coefficients[1].keys() and len(coefficients[0]) == 2 * 4
    assert all(torch.equal(c, coefficients[1][name]) for name, c in coefficients[0].items())
