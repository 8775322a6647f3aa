"""Factors of experts that share a parameter, as PEFT's LoRA has them: all in one entry, beside the parameter."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, NamedTuple

from torch import Tensor

from zoft.optim.experts import find_experts

Factors = dict[str, tuple[Tensor, Tensor]]  # V [d_in, r] and C [d_out, r], float32, by the layer's name


class Stack(NamedTuple):
    """`down` [experts * r, d_in], expert by expert; `up` [d_out, r * experts], the columns of all experts in turn.

    `wrapper` is the name of the module that has them in a model that PEFT has adapted, where those of several
    parameters of a module lie within each other.
    """

    rank: int
    down: Tensor
    up: Tensor
    wrapper: str


def stacked(base: Any, factors: Factors) -> dict[str, Stack]:
    """Those of `factors` that are experts' of `base`, by the parameter's name; zero for experts that have none."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, _ in find_experts(base):
        groups[name.rpartition(".")[0]].append(name)
    stacks, within = {}, Counter[str]()
    for parameter, names in reversed(groups.items()):  # a module's last parameter is wrapped last
        module, pairs = parameter.rpartition(".")[0], [factors.get(name) for name in names]
        if any(pairs):
            stacks[parameter] = _stack(pairs, module + ".base_layer" * within[module])
            within[module] += 1
    return stacks


def _stack(pairs: list[tuple[Tensor, Tensor] | None], wrapper: str) -> Stack:
    known = [pair for pair in pairs if pair is not None]
    basis, factor = known[0]
    rank = max(basis.shape[1] for basis, _ in known)
    down = basis.new_zeros(len(pairs), rank, len(basis))
    up = factor.new_zeros(len(factor), rank, len(pairs))
    for i, pair in enumerate(pairs):
        if pair is not None:
            own = pair[0].shape[1]
            down[i, :own], up[:, :own, i] = pair[0].t(), pair[1]
    return Stack(rank, down.flatten(0, 1), up.flatten(1), wrapper)


def unstacked(parameter: str, experts: int, down: Tensor, up: Tensor) -> Factors:
    """What `stacked` has put together, without experts of which nothing is known."""
    bases, lefts = down.unflatten(0, (experts, -1)), up.unflatten(1, (-1, experts))
    return {
        f"{parameter}.{i}": (bases[i].t().contiguous(), lefts[..., i].contiguous())
        for i in range(experts)
        if bool(bases[i].any())
    }
