"""Coefficients as a PEFT adapter, and back: ``x W^T + (x V) C^T`` is LoRA with ``lora_A = V^T`` and ``lora_B = C``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from zoft.errors import UserError
from zoft.optim import ZeroOrder
from zoft.optim.layers import find_linear_maps, selected
from zoft.optim.probe import SideBranches
from zoft.train.heads import heads_of, learned, task_of
from zoft.train.stacks import Factors, stacked, unstacked

# Layers that PEFT loads no adapter of, by the model's type: it refuses Mamba's, and does not find the others by name.
NOT_LOADED = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("*.out_proj",))
NOT_LOADED |= {"git": ("output",), "laguna": ("*.shared_experts.*",)}


def save_adapter(optimizer: ZeroOrder, folder: Path) -> None:
    """Write the optimizer's coefficients as a LoRA adapter (float32) that `peft.PeftModel.from_pretrained` loads.

    Raises:
        UserError: there are no coefficients (no estimate was made, or none had a finite loss), or PEFT loads none of
            some layer.
    """
    known = optimizer.coefficients
    trained = [name for name, factor in known.items() if name in optimizer.updates or bool(factor.any())]
    factors = {name: (optimizer.bases[name], known[name]) for name in trained or known}  # none may have moved yet
    if not factors:
        raise UserError("there are no coefficients to save: no estimate so far had a finite loss")
    refused = not_loaded(optimizer.model)
    if names := [name for name in factors if selected(name, refused, ())] if refused else []:
        raise UserError(f"PEFT loads no adapter of {names[0]!r}: leave such layers out with exclude={refused}")
    write_lora(folder, factors, optimizer.model)


def write_lora(folder: Path, factors: Factors, base: Any) -> None:
    """Write `factors`, which `base` was trained with, as a LoRA adapter of rank r and alpha r: a scaling of 1.

    A layer with another rank than most (too few tokens, or too narrow an input) has its own in ``rank_pattern``.
    Layers that PEFT would take for experts are named by their parameters, which it does not; experts that share a
    parameter are one entry, of their largest rank. Heads that a pretrained model comes without are written whole.

    Raises:
        UserError: only such heads were trained.
    """
    heads = learned(base, factors)
    factors = {name: pair for name, pair in factors.items() if f"{name}.weight" not in heads}
    stacks = stacked(base, factors)
    layers = {name: pair for name, pair in factors.items() if name.rpartition(".")[0] not in stacks}
    taken = _taken_for_experts(base, layers)
    ranks = {f"{name}.weight" if name in taken else name: basis.shape[1] for name, (basis, _) in layers.items()}
    ranks |= {name: stack.rank for name, stack in stacks.items()}
    if not ranks:
        raise UserError("only the head has learned, and PEFT loads no adapter without other layers: include some")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    different = {name: r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=different,
        alpha_pattern=different,
        target_modules=sorted(layers.keys() - taken),
        target_parameters=sorted(ranks.keys() - layers.keys()) or None,
        fan_in_fan_out=any(isinstance(base.get_submodule(name), Conv1D) for name in layers),
        task_type=task_of(base),
        modules_to_save=[*heads_of(base)] or None,
        base_model_name_or_path=getattr(base, "name_or_path", None),
        inference_mode=True,
    )
    tensors = {f"base_model.model.{name}": tensor for name, tensor in heads.items()}
    rows = {name: (basis.t(), factor) for name, (basis, factor) in layers.items()}
    for name, (down, up) in (rows | {stack.wrapper: (stack.down, stack.up) for stack in stacks.values()}).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.cpu().clone(memory_format=torch.contiguous_format)
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.cpu().clone(memory_format=torch.contiguous_format)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def not_loaded(model: Any) -> tuple[str, ...]:
    """Patterns of the layers of `model` that PEFT loads no adapter of."""
    return NOT_LOADED.get(getattr(getattr(model, "config", None), "model_type", ""), ())


def _taken_for_experts(base: Any, names: Iterable[str]) -> set[str]:
    """Which of the linear layers `names` PEFT would take for the experts of an earlier transformers, by their ends.

    It then adapts the experts, and loses the layers (https://github.com/huggingface/peft/issues/3711).
    """
    config = LoraConfig(target_modules=list(names))
    try:
        convert_peft_config_for_transformers(config, base, None)
    except ValueError:  # only some of what it would make an expert of is there
        return set(names)
    return set(names) - set(config.target_modules or ())


def take_apart(adapted: PeftModel) -> tuple[Any, Factors]:
    """The model that `adapted` adds to, and what it adds: V and C of each layer, scaling included.

    Raises:
        UserError: the adapter is more than a low-rank product beside linear layers.
    """
    config = adapted.active_peft_config
    if config.peft_type != PeftType.LORA or config.use_dora or config.modules_to_save or config.bias != "none":
        raise UserError(
            "this adapter is more than LoRA beside linear layers: zo-act and guided cannot go on from it, and it "
            "cannot be exported; agzo, lozo, mezo and fo-adamw train its own parameters"
        )
    factors: Factors = {}
    tuned: Any = adapted.base_model.model
    for name, layer in tuned.named_modules():
        if isinstance(layer, LoraLayer):
            down: Any = layer.lora_A
            up: Any = layer.lora_B
            inner = name.replace(".base_layer", "")  # as it is called without the wrappers around it
            for adapter, scale in layer.scaling.items():
                rows, factor = down[adapter].weight.detach().float(), up[adapter].weight.detach().float() * scale
                if isinstance(layer, ParamWrapper) and layer.get_param().dim() == 3:
                    factors |= unstacked(f"{inner}.{layer.parameter_name}", layer.num_experts, rows, factor)
                else:
                    factors[inner] = rows.t().contiguous(), factor
    return without(adapted), factors


def without(model: Any) -> Any:
    """`model` without its adapter, if it has one."""
    if not isinstance(model, PeftModel):
        return model
    base: Any = model.get_base_model() if model.active_peft_config.is_prompt_learning else model.unload()
    for parameter in base.parameters():  # the adapter has frozen them
        parameter.requires_grad_(parameter.is_floating_point())
    return base


def peft_runs(model: Any) -> bool:
    """Whether PEFT can run `model`: what it adds to a parameter, not beside a layer, takes the parameter in place."""
    return not any(isinstance(module, ParamWrapper) and module.get_param().is_meta for module in model.modules())


def beside(model: Any, factors: Factors) -> Any:
    """`model` with `factors` beside its layers, for good: the same as PEFT's, wherever the weights are."""
    branches = SideBranches([m for m in find_linear_maps(model, experts=True) if m.name in factors])
    branches.bases = {m.name: factors[m.name][0].to(m.device) for m in branches.maps}
    branches.factors = {m.name: factors[m.name][1].to(m.device) for m in branches.maps}
    branches.attach()
    return model


def start_from(optimizer: ZeroOrder, factors: Factors) -> None:
    """Begin with an adapter's bases V and coefficients C; `optimizer` keeps coefficients and has made no estimate yet.

    Raises:
        UserError: the adapter has a layer that `optimizer` does not train.
    """
    foreign = factors.keys() - {m.name for m in optimizer.maps}
    if foreign:
        raise UserError(
            f"the adapter adds to layer {min(foreign)!r}, which this method does not train: exclude fewer layers, or "
            "take zo-act, which trains all linear layers and experts"
        )
    distinct: dict[tuple[object, ...], list[Tensor]] = {}
    bases = {}
    for name, (basis, _) in factors.items():  # layers that read the same input have equal ones
        alike = distinct.setdefault((basis.shape, basis.device, float(basis.sum())), [])
        bases[name] = next((other for other in alike if torch.equal(other, basis)), basis)
        if bases[name] is basis:
            alike.append(basis)
    optimizer.set_bases(bases)
    optimizer.coefficients.update({name: factor for name, (_, factor) in factors.items()})
