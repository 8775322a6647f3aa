"""Calls of modules: what runs instead for a while, and whether two are given the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, calls of `module` run `forward`, between its own hooks."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal in shape, dtype, device and all values."""
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return one is other or (alike and torch.equal(one, other))
