"""Guided training of weights that transformers has quantized with real backends, on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from zoft.optim import Guided, cross_entropy
from zoft.optim.layers import find_linear_maps

from .models import llama, token_batch

BACKENDS = {
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose layers are large enough to be packed."""
    llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def estimate(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The guided estimate of each layer's gradient."""
    optimizer = Guided(model, lr=1e-2)
    optimizer.estimate(lambda: cross_entropy(model(**batch).logits, batch["labels"]))
    found = optimizer.take_estimate()
    assert found is not None
    optimizer.branches.detach()
    return {name: factor @ optimizer.bases[name].t() for name, factor in found.factors.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_estimates_are_those_of_the_weights_unpacked(backend: str, folder: Path) -> None:
    batch = token_batch()
    quantized: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BACKENDS[backend]()).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    weights = {m.name: m.dense_weight() for m in find_linear_maps(quantized)}
    quantized(**batch)  # some lay their weights out anew when they are called first
    with torch.no_grad():
        for layer in find_linear_maps(quantized):
            weight, before = layer.dense_weight(), weights[layer.name]
            assert weight is not None and before is not None
            assert torch.allclose(weight.float(), before.float(), atol=0.01 * float(before.std()))
            if isinstance(target := plain.get_submodule(layer.name), nn.Linear):
                target.weight.copy_(weight)
    ours, exact = estimate(quantized, batch), estimate(plain, batch)
    assert ours.keys() == exact.keys() and len(ours) == 2 * 4
    for name, gradient in exact.items():
        assert torch.cosine_similarity(ours[name].flatten(), gradient.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_learns(backend: str, folder: Path) -> None:
    batch = token_batch()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BACKENDS[backend]()).eval()
    optimizer = Guided(model, lr=1e-2)
    losses = [
        float(optimizer.step(lambda: cross_entropy(model(**batch).logits, batch["labels"])) or 0) for _ in range(20)
    ]
    assert losses[-1] < losses[0] - 0.2
