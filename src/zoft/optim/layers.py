"""What in a model is a linear map, which way its weight lies, and what else can be trained."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from zoft.optim.experts import Expert, find_experts
from zoft.optim.placement import device_of, is_sharded, loaded_parameter
from zoft.optim.products import WideLinear

CONTAINERS = (nn.ParameterDict, nn.ParameterList)


class NoLinearLayers(ValueError):
    """The model has no linear layer to train; the message lists the modules it does have."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One linear map ``y = x W^T`` of the model, wherever and however often it is applied.

    `modules` apply it to activations; `lookups` are embeddings that share its weight (or are the map
    themselves) and read its rows. `parameter` is the model's that `weight` is, or lies in: an expert's is the `part` of
    that number of a three-dimensional one. It is None where that is no plain floating-point tensor (a quantized layer),
    and on the meta device where it is offloaded: such a map can carry a side branch but cannot be written to.
    `transposed` says that the weight is stored as ``[d_in, d_out]`` (GPT-2's ``Conv1D``) instead of ``[d_out, d_in]``.
    """

    name: str
    modules: tuple[nn.Module, ...]
    lookups: tuple[nn.Embedding, ...]
    parameter: Tensor | None
    transposed: bool
    d_in: int
    d_out: int
    part: int = 0

    @property
    def fused(self) -> Tensor | None:
        """The parameter that an expert shares with others; None for every other map."""
        return self.parameter if isinstance(self.module, Expert) else None

    @property
    def weight(self) -> Tensor | None:
        """Where W lies, to be read and written; None if it cannot be."""
        if self.fused is None:
            return self.parameter
        return None if is_sharded(self.fused) else self.fused.detach()[self.part]  # anew, as the model may have moved

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        owners = [module.owner if isinstance(module, Expert) else module for module in self.modules]
        return device_of(*owners, *self.lookups)

    @property
    def module(self) -> nn.Module:
        """The first of those that hold the weight."""
        return (*self.modules, *self.lookups)[0]

    @property
    def wide(self) -> bool:
        """Whether its products are in float32, though its weight is of half precision."""
        return isinstance(self.module, WideLinear)

    def dense_weight(self) -> Tensor | None:
        """W [d_out, d_in] as a plain tensor, loaded or made anew from a quantized one; None if it cannot be read."""
        module = self.module
        if self.weight is not None:
            weight = loaded_parameter(module, "weight") if self.weight.is_meta else self.weight
            return weight.t() if self.transposed else weight
        packed: Any = getattr(module, "weight", None)
        state: Any = getattr(packed, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False) or _is_gguf(module):  # laid out for their forward alone
            dtype = getattr(state, "dtype", torch.float32)
            units = torch.eye(self.d_in + 1, self.d_in, dtype=dtype, device=self.device)
            columns = module.forward(units)  # of zero, the last, it makes the bias
            return (columns[:-1] - columns[-1]).t()
        unpack = getattr(module, "dequantize_weight", None)  # GPTQ's and AWQ's layers, in gptqmodel: [d_in, d_out]
        made = dequantized(packed) if unpack is None else unpack().t()
        return made if made is not None and made.shape == (self.d_out, self.d_in) else None


def find_linear_maps(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    linear: Sequence[str] = (),
    embeddings: bool = False,
    experts: bool = False,
) -> list[LinearMap]:
    """The linear maps of `model` that may be trained, in the model's order, each weight once.

    A module counts if it is an ``nn.Linear``, a transformers ``Conv1D``, a layer of GPTQ, AWQ or packed GGUF, or if its
    name matches a pattern of `linear` and it has ``in_features`` and ``out_features`` or a ``[d_out, d_in]`` weight.
    `include` and `exclude` are shell-style patterns on names of modules (``"*.q_proj"``) or weights. Frozen weights
    (``requires_grad=False``) are left out, quantized ones, which cannot require a gradient, are not. A weight
    shared with an embedding is a map only with `embeddings`, and then every embedding is one: its gradient
    has no activation basis. With `experts`, the matrices of a fused weight are maps too (`zoft.optim.experts`).

    Raises:
        NoLinearLayers: nothing is left to train.
    """
    names = {module: name for name, module in model.named_modules()}
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    for module in names:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            weight = module  # packed under names of its own, or computed anew (torch.nn.utils.parametrize)
        if _is_linear(module, names[module], linear) or _is_lookup(module):
            owners[id(weight)].append(module)

    maps = []
    for sharing in owners.values():
        lookups = tuple(m for m in sharing if isinstance(m, nn.Embedding))
        modules = tuple(m for m in sharing if not isinstance(m, nn.Embedding))
        first = sharing[0]
        name, weight = names[first], getattr(first, "weight", None)
        if (lookups and not embeddings) or _is_frozen(weight) or not _is_chosen(f"{name}.weight", include, exclude):
            continue
        if any(type(m).forward is not nn.Embedding.forward for m in lookups):
            continue  # an embedding that scales what it reads, or reads other rows than it is asked for
        maps.append(_linear_map(name, modules, lookups))
    for name, expert in find_experts(model) if experts else ():
        if _is_plain(expert.fused) and expert.fused.requires_grad and selected(name, include, exclude):
            shape = (expert.d_in, expert.d_out)
            maps.append(LinearMap(name, (expert,), (), expert.fused, expert.transposed, *shape, expert.index))
    if not maps:
        kinds = Counter(type(m).__name__ for m in names if not any(True for _ in m.children()))
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "no module at all"
        named = next((names[sharing[0]] for sharing in owners.values() if not _is_lookup(sharing[0])), None)
        patterns = ", ".join(repr(pattern) for pattern in (*include, *exclude)) or "none"
        called = f"; a linear layer here is called {named!r}" if named else ""
        raise NoLinearLayers(
            f"no trainable linear layer in {type(model).__name__} (found: {found}). Check include/exclude "
            f"({patterns}{called}) and requires_grad, name modules that map x to y with linear=[...], or take MeZO, "
            "which needs none"
        )
    return maps


def as_linear_map(name: str, module: nn.Module, linear: Sequence[str] = ()) -> LinearMap | None:
    """`module` as a map of its own, whether it may be trained or not; None if it is not a linear one."""
    return _linear_map(name, (module,), ()) if _is_linear(module, name, linear) else None


def other_parameters(
    model: nn.Module,
    maps: Sequence[LinearMap],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, nn.Parameter]:
    """Trainable floating-point parameters that belong to none of `maps`: norms, biases, embeddings.

    `include` and `exclude` are patterns on their names or on those of the modules that have them.
    """
    taken = {id(layer.parameter) for layer in maps}
    return {
        name: p
        for name, p in model.named_parameters()
        if id(p) not in taken and _is_plain(p) and p.requires_grad and _is_chosen(name, include, exclude)
    }


def owners_of(
    model: nn.Module, parameters: dict[str, nn.Parameter]
) -> Iterator[tuple[nn.Module, dict[str, tuple[nn.Module, str]]]]:
    """Modules that read some of `parameters`, with the names of those and where each lies; tied ones appear in each.

    What lies in a ``ParameterDict`` or ``ParameterList``, which is never called, is its parent's.
    """
    name_of = {id(p): name for name, p in parameters.items()}
    for module in model.modules():
        if isinstance(module, CONTAINERS):
            continue
        holders = [module, *(child for child in module.children() if isinstance(child, CONTAINERS))]
        places = {
            name_of[id(p)]: (holder, own)
            for holder in holders
            for own, p in holder._parameters.items()
            if id(p) in name_of
        }
        if places:
            yield module, places


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear map was called with, whether by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def dequantized(weight: Any) -> Tensor | None:
    """A quantized weight as a plain tensor: bitsandbytes' 4 and 8 bits, and what has a ``dequantize`` of its own."""
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if getattr(weight, "SCB", None) is not None:
        return weight.data * (weight.SCB.unsqueeze(1) / 127)
    if isinstance(weight, Tensor) and (weight.is_quantized or type(weight).dequantize is not Tensor.dequantize):
        return weight.dequantize()
    return None


def selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether `name` matches `include` (all, if empty) and no pattern of `exclude`."""
    wanted = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in exclude)


def _is_chosen(parameter: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a parameter of this name is selected, by it or by the name of its module."""
    names = parameter, parameter.rpartition(".")[0]
    return any(selected(name, include, ()) for name in names) and all(selected(name, (), exclude) for name in names)


def _linear_map(name: str, modules: tuple[nn.Module, ...], lookups: tuple[nn.Embedding, ...]) -> LinearMap:
    first = (*modules, *lookups)[0]
    transposed = _is_conv1d(first)
    d_out, d_in = _shape(first, name)
    weight = getattr(first, "weight", None)
    readable = (
        isinstance(weight, Tensor)
        and _is_plain(weight)
        and weight.shape == ((d_in, d_out) if transposed else (d_out, d_in))
    )
    return LinearMap(name, modules, lookups, weight if readable else None, transposed, d_in, d_out)


def _is_conv1d(module: nn.Module) -> bool:
    # transformers.pytorch_utils.Conv1D, told by its shape: the core does not import transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_gguf(module: nn.Module) -> bool:
    return hasattr(module, "ggml_type") and hasattr(module, "in_features")


def _is_linear(module: nn.Module, name: str, patterns: Sequence[str]) -> bool:
    named = any(fnmatchcase(name, pattern) for pattern in patterns)
    packed = hasattr(module, "qweight") or _is_gguf(module)  # the former are GPTQ's and AWQ's layers
    return (isinstance(module, nn.Linear) and _maps_rows(module)) or _is_conv1d(module) or packed or named


@torch.no_grad()
def _maps_rows(module: nn.Linear) -> bool:
    """False for those with a forward of their own that returns something else: routers, layers in groups."""
    weight = module.weight
    usual = type(module).forward in (nn.Linear.forward, WideLinear.forward)
    if usual or not _is_plain(weight) or weight.is_meta or is_sharded(weight):
        return True
    try:  # a copy, as it may keep something of what it sees
        y = type(module).forward(copy.copy(module), weight.new_zeros(1, 1, module.in_features))
    except Exception:  # whatever it raises, it takes no rows
        return False
    return isinstance(y, Tensor) and y.shape == (1, 1, module.out_features)


def _is_lookup(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _is_plain(weight: Tensor | None) -> TypeGuard[nn.Parameter]:
    if type(weight) is nn.Parameter or (is_sharded(weight) and isinstance(weight, nn.Parameter)):
        return weight.is_floating_point() and weight.itemsize > 1  # numbers of 8 bits come with scales
    return False


def _is_frozen(weight: Tensor | None) -> bool:
    return _is_plain(weight) and not weight.requires_grad


def _shape(module: nn.Module, name: str) -> tuple[int, int]:
    features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if None not in features:
        return features  # type: ignore[return-value]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"module {name!r} has neither in_features/out_features nor a two-dimensional weight")
    d_out, d_in = weight.shape
    return (d_in, d_out) if _is_conv1d(module) else (d_out, d_in)
