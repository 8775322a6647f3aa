"""What an optimizer has to remember, as a dictionary that ``torch.save`` and ``torch.load(weights_only=True)`` take."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from zoft.optim.optimizer import ZeroOrder


def pack(optimizer: ZeroOrder) -> dict[str, Any]:
    """The state of `optimizer`; only bases are copied, off the shelf, which would be saved whole with them."""
    bases = {id(basis): basis.clone() for basis in optimizer.bases.values()}  # layers share some
    return {
        "made_for": _made_for(optimizer),
        "state": {
            "bases": {name: bases[id(basis)] for name, basis in optimizer.bases.items()},
            "coefficients": optimizer.coefficients,
            "updates": optimizer.updates,
            "basis_updates": optimizer.basis_updates,
        },
        "active": [m.name for m in optimizer.branches.active],
        "renewed_at": optimizer.renewed_at,
        "counters": asdict(optimizer.counters),
        "usual_square": optimizer.pace.square,
        "seed": optimizer.seed,
        "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
    }


def unpack(optimizer: ZeroOrder, packed: dict[str, Any]) -> None:
    """Put copies of what `pack` gave into `optimizer`, on its devices.

    Raises:
        ValueError: it is of another model, or of a method of another kind.
    """
    made_for = _made_for(optimizer)
    unnamed = {name: value for name, value in made_for.items() if name != "update"}  # as states of before have it
    if packed.get("made_for") not in (made_for, unnamed):
        raise ValueError(
            "this optimizer state is of another model or method: it trains other layers, or in another way"
        )
    devices = {m.name: m.device for m in optimizer.maps} | {name: p.device for name, p in optimizer.dense.items()}
    state = copy.deepcopy(packed["state"])  # layers that share a basis share its copy
    for own, loaded in ((optimizer.bases, state["bases"]), (optimizer.coefficients, state["coefficients"])):
        own.clear()
        own.update(_moved(loaded, devices))
    optimizer.updates, optimizer.basis_updates = (
        {
            name: {k: v if v.dim() == 0 else v.to(devices[name]) for k, v in values.items()}
            for name, values in updates.items()
        }
        for updates in (state["updates"], state.get("basis_updates", {}))  # states of before have none
    )
    optimizer.branches.active = [m for m in optimizer.maps if m.name in packed["active"]]
    optimizer.renewed_at, optimizer.seed = packed["renewed_at"], packed["seed"]
    optimizer.counters = type(optimizer.counters)(**packed["counters"])
    optimizer.pace.square = packed["usual_square"]
    for group, saved in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        group.update(saved)


def _made_for(optimizer: ZeroOrder) -> dict[str, Any]:
    shapes = {m.name: [m.d_out, m.d_in] for m in optimizer.maps}
    shapes |= {name: list(p.shape) for name, p in optimizer.dense.items()}
    return {"update": type(optimizer.update).__name__, "into": optimizer.update.into, "shapes": shapes}


def _moved(tensors: dict[str, Tensor], devices: dict[str, torch.device]) -> dict[str, Tensor]:
    """`tensors` on the devices of their layers; one that several layers share stays one."""
    moved: dict[tuple[int, torch.device], Tensor] = {}
    for name, tensor in tensors.items():
        moved.setdefault((id(tensor), devices[name]), tensor.to(devices[name]))
    return {name: moved[id(tensor), devices[name]] for name, tensor in tensors.items()}
