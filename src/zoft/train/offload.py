"""Models larger than their device: how much of the weights stays there, and where the rest waits (accelerate)."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int, get_max_memory, set_module_tensor_to_device

from zoft.errors import UserError
from zoft.optim.placement import device_of

ALL = "auto"  # as much as there is room for


def memory_size(text: str) -> int | None:
    """Bytes of ``4GiB`` or ``500MB``; None for ``auto``.

    Raises:
        UserError: it is neither.
    """
    if text == ALL:
        return None
    try:
        return int(convert_file_size_to_int(text))
    except ValueError as error:
        raise UserError(f"memory must be {ALL} or a size such as 4GiB or 500MB, not {text!r}") from error


def placement(memory: str, device: torch.device, folder: str) -> dict[str, Any]:
    """What ``from_pretrained`` takes to keep `memory` of the weights on each accelerator, or on the CPU as `device`.

    The rest waits in memory and then on the disk: in the model's own files, or in `folder` if these cannot be read
    layer by layer.
    """
    limits, size = get_max_memory(), memory_size(memory)
    if device.type == "cpu":
        limits = {"cpu": limits["cpu"]}
    accelerators = [place for place in limits if place != "cpu"]
    if size is not None:
        limits |= dict.fromkeys(accelerators or ["cpu"], size)
    return {"device_map": "auto", "max_memory": limits, "offload_folder": folder}


def kept(model: Any) -> str:
    """How much of the weights is not offloaded, such as ``1.5 of 8.0 GiB``."""
    sizes = [(p.is_meta, p.numel() * p.element_size() / 2**30) for p in model.parameters()]
    return f"{sum(size for away, size in sizes if not away):.1f} of {sum(size for _, size in sizes):.1f} GiB"


def name_parts(model: Any) -> None:
    """Let accelerate see that all of `model` is offloaded, if it is: it would move one whose map has a single part."""
    where = model.hf_device_map.get("")
    if where is not None:
        model.hf_device_map = {name: where for name, _ in model.named_children()}


def add_adapter(model: Any, place: str, trainable: bool) -> Any:
    """`model`, parts of which may be offloaded, with the PEFT adapter in the folder `place`, which is not.

    PEFT would let accelerate place the whole anew, which cannot read what is offloaded.

    Raises:
        UserError: it is no LoRA.
    """
    from peft import PeftConfig, PeftModel, PeftType
    from peft.utils import load_peft_weights

    kind = PeftConfig.from_pretrained(place).peft_type
    if kind != PeftType.LORA:
        raise UserError(f"beside offloaded weights an adapter must be a LoRA, which {place} is not: leave memory out")

    placed = vars(model).pop("hf_device_map")
    adapted: Any = PeftModel.from_pretrained(model, place, is_trainable=trainable, low_cpu_mem_usage=True)
    model.hf_device_map = placed
    weights = load_peft_weights(place, device="cpu")
    for name, parameter in list(adapted.named_parameters()):
        if parameter.is_meta and (saved := weights.get(name.replace(".default", ""))) is not None:
            owner = adapted.get_submodule(name.partition(".lora_")[0])
            set_module_tensor_to_device(adapted, name, device_of(owner), saved)
    return adapted
