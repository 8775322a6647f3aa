"""Where weights lie: on one device or several, loaded for each forward (accelerate), or in shards (fully_shard).

A model larger than its device is run by others: accelerate's hooks load a module's weights as it is called, torch's
``fully_shard`` gathers them. Between forwards there are a meta tensor or this process's rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def device_of(*modules: nn.Module) -> torch.device:
    """Where `modules` compute, by their first parameter or buffer; the CPU, if they have none."""
    devices = (device for module in modules for device in _devices(module))
    return next(devices, torch.device("cpu"))


def devices_of(model: nn.Module) -> set[torch.device]:
    """All devices that `model` computes on."""
    return set(_devices(model))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast has `device` compute in; None if it is off."""
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def unrounded(device: torch.device) -> AbstractContextManager[Any]:
    """While open, what is computed on `device` keeps its precision, though the model may run under autocast."""
    return torch.autocast(device.type, enabled=False) if autocast_dtype(device) else nullcontext()


def is_hooked(model: nn.Module) -> bool:
    """Whether accelerate runs `model`: then its meta tensors are offloaded ones."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def loaded_parameter(model: nn.Module, name: str) -> Tensor:
    """A parameter, loaded if it is offloaded; still a meta tensor if a larger module is loaded with it."""
    from accelerate.utils import align_module_device

    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module):
        return module.get_parameter(own).detach()


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is spread over several processes (a DTensor)."""
    module = sys.modules.get("torch.distributed.tensor")  # else there is none, and the import is saved
    return module is not None and isinstance(tensor, module.DTensor)


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """What of `tensor` is here, to be written in its place, and the number of its first row."""
    if not is_sharded(tensor):
        return tensor, 0
    sharded: Any = tensor
    mesh, dim = sharded.device_mesh, _sharded_dim(sharded)
    assert dim is not None
    rows = -(-len(tensor) // mesh.size(dim))  # as torch.chunk has it
    return sharded.to_local(), min(len(tensor), rows * mesh.get_local_rank(dim))


def take_over(model: nn.Module) -> bool:
    """Let what ``fully_shard`` has sharded be gathered for each forward anew; return whether there is any.

    Without a backward pass nothing is kept gathered after a forward, and the next one is to see what was written.

    Raises:
        ValueError: the model is spread over processes in another way.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    modules = [m for m in model.modules() if fsdp is not None and isinstance(m, fsdp.FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise ValueError("FullyShardedDataParallel keeps no weights by layer: shard the model with fully_shard (FSDP2)")
    gathered = {id(p) for module in modules for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) and (id(parameter) not in gathered or _sharded_dim(parameter) is None):
            raise ValueError(
                f"{name!r} is split by tensor parallelism: a side branch would not fit the part of a layer that a "
                "process computes. Shard the model with fully_shard (FSDP2), or use device_map"
            )
    return bool(modules)


def _sharded_dim(tensor: Any) -> int | None:
    """The dimension of the mesh along which `tensor` lies in blocks of rows, copied along the rest; None if not so."""
    sharded = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return sharded[0] if len(sharded) == 1 and tensor.placements[sharded[0]].is_shard(0) else None


def _devices(module: nn.Module) -> Iterator[torch.device]:
    """Of each parameter and buffer, where the module that owns it computes."""
    for owner in module.modules():
        for tensor in (*owner._parameters.values(), *owner._buffers.values()):
            if tensor is None:
                continue
            device = tensor.device
            if is_sharded(tensor):
                sharded: Any = tensor
                kind = sharded.device_mesh.device_type  # not where the shard lies, if those wait in memory
                device = device if device.type == kind else torch.device(kind)
            elif device.type == "meta":
                hook = getattr(owner, "_hf_hook", None)  # accelerate's
                target = getattr(hook, "execution_device", None)
                device = device if target is None else torch.device(target)
            yield device
