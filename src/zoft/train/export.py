"""What a run has learned, in other forms: merged weights, a PEFT adapter, a LoRA file of llama.cpp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from peft import PeftModel
from torch import Tensor

from zoft.errors import UserError
from zoft.optim.layers import find_linear_maps
from zoft.train.adapter import Factors, take_apart, write_lora
from zoft.train.config import TrainConfig
from zoft.train.files import write_folder
from zoft.train.models import load_model

RANK = 16  # of an adapter made of full weights
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2"}
ARCHITECTURES |= {"gemma3": "gemma3", "gemma3_text": "gemma3"}  # transformers' model type: llama.cpp's architecture


class Learned(NamedTuple):
    """What training has added to the linear layers of `base`, and what part of it that is.

    `energy` is the squared norm of the low-rank factors over that of the whole change of those layers; `left_out` names
    parameters that have changed and are in no linear layer.
    """

    base: Any
    factors: Factors
    energy: float
    left_out: list[str]


def merge(name: str, folder: Path, dtype: str = "auto") -> float:
    """Save the model `name`, its adapter added to the weights, into `folder`; return what rounding has cost.

    That is the norm of the difference between the update and the change of the rounded weights, over the update's: 0
    where there was no adapter. `dtype` is the base model's, unless it is given.

    Raises:
        UserError: the model cannot be loaded, its weights cannot be written, or the folder is taken.
    """
    adapted, tokenizer = load_model(name, dtype=dtype, device="cpu")
    model, lost = merged(adapted)

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)

    write_folder(folder, write)
    return lost


def merged(model: Any) -> tuple[Any, float]:
    """`model` with its adapter, if it has one, added to the weights; and what rounding has cost, as in `merge`.

    Raises:
        UserError: the weights cannot be written.
    """
    if not isinstance(model, PeftModel):
        return model, 0.0
    plain, factors = take_apart(model)
    weights = _weights(plain)
    lost = wanted = 0.0
    for layer, (basis, factor) in factors.items():
        if layer not in weights:
            raise UserError(
                f"layer {layer!r} is quantized: its weight cannot take an update; unless it was saved so, load it with "
                "--dtype float32"
            )
        update, before = factor @ basis.t(), weights[layer].to(torch.float32, copy=True)
        weights[layer].add_(update)
        lost += float((weights[layer].float() - before - update).square().sum())
        wanted += float(update.square().sum())
    return plain, (lost / wanted) ** 0.5 if wanted else 0.0


def learned(name: str, base: str | None = None, rank: int = RANK) -> Learned:
    """What the run or adapter `name` has learned, as low-rank factors.

    An adapter has them. Of full weights they are the leading `rank` singular directions of each layer's change since
    `base`, which is the model that the run began with, unless it is given.

    Raises:
        UserError: there is no such model, or it differs from the base in more than its weights' values.
    """
    model, _ = load_model(name, dtype="float32", device="cpu")
    if isinstance(model, PeftModel):
        plain, factors = take_apart(model)
        return Learned(plain, factors, 1.0, [])
    settings = Path(name) / "config.yaml"
    if base is None and not settings.is_file():
        raise UserError(f"{name} does not say which model it began as: give --base")
    begun = base or TrainConfig.load(settings, device="cpu").model  # the run's device may not be here
    start, _ = load_model(begun, dtype="float32", device="cpu")
    old = dict(start.named_parameters())
    changed = [n for n, p in model.named_parameters() if n not in old or not torch.equal(p, old[n])]
    after, before = _weights(model), _weights(start)
    if {n: w.shape for n, w in after.items()} != {n: w.shape for n, w in before.items()}:
        raise UserError(f"{name} and its base have different layers: give the base it was trained from with --base")
    factors, kept, whole = {}, 0.0, 0.0
    for layer, weight in after.items():
        change = weight - before[layer]
        if bool(change.any()):
            u, sigma, v = torch.linalg.svd(change, full_matrices=False)
            factors[layer] = v[:rank].t().contiguous(), u[:, :rank] * sigma[:rank]
            kept, whole = kept + float(sigma[:rank].square().sum()), whole + float(sigma.square().sum())
    if not factors:
        raise UserError(f"no linear layer of {name} differs from its base")
    covered = {id(m.parameter) for m in find_linear_maps(model, experts=True) if m.name in factors}
    left_out = [n for n, p in model.named_parameters() if n in changed and id(p) not in covered]
    return Learned(start, factors, kept / whole, left_out)


def to_peft(found: Learned, folder: Path) -> None:
    """Save `found` as a LoRA adapter that PEFT loads on the base model."""
    write_folder(folder, lambda aside: write_lora(aside, found.factors, found.base))


def to_gguf(found: Learned, file: Path) -> None:
    """Save `found` as a LoRA file for ``llama-cli --lora FILE`` beside the base model's own .gguf.

    llama.cpp keeps the queries and keys of Llama's architecture in another order of rows, and so does this file.

    Raises:
        UserError: the architecture is not among `ARCHITECTURES`, or a layer has no name there.
    """
    config = found.base.config.get_text_config()
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"model type {config.model_type!r}: LoRA files can be made of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[config.model_type]
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    if file.exists():
        raise UserError(f"{file} is there already: choose another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(partial, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = max(basis.shape[1] for basis, _ in found.factors.values())
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for layer, (basis, factor) in found.factors.items():
        name = names.get_name(layer)
        if name is None:
            raise UserError(f"layer {layer!r} has no name in llama.cpp's architecture {architecture}")
        if architecture == "llama":
            factor = _reordered(layer, factor, config)
        scale = basis.shape[1] / rank  # llama.cpp multiplies by alpha / r, of each layer
        writer.add_tensor(f"{name}.weight.lora_a", basis.t().contiguous().numpy())
        writer.add_tensor(f"{name}.weight.lora_b", (factor * scale).contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _reordered(layer: str, rows: Tensor, config: Any) -> Tensor:
    """`rows` [d_out, ...] of a query or key matrix with the two halves of each head interleaved; others as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer.rpartition(".")[2])
    return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _weights(model: Any) -> dict[str, Tensor]:
    """The weights [d_out, d_in] of the linear layers and experts, as views; without those that are quantized."""
    return {
        m.name: m.weight.data.t() if m.transposed else m.weight.data
        for m in find_linear_maps(model, experts=True)
        if m.weight is not None
    }
