"""zoft: fine-tune language models with forward passes only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoft.optim import AGZO, AIMZO, LOZO, Guided, Loss, MeZO, ZeroOrder, ZOAct, cross_entropy
    from zoft.train import ZOTrainer

__version__ = "0.1.0"
__all__ = ["AGZO", "AIMZO", "LOZO", "Guided", "Loss", "MeZO", "ZOAct", "ZOTrainer", "ZeroOrder", "cross_entropy"]


def __getattr__(name: str) -> Any:
    """Import on first use: ``zoft.AGZO`` needs torch, ``zoft.ZOTrainer`` transformers, ``zoft --help`` neither."""
    if name not in __all__:
        raise AttributeError(f"module 'zoft' has no attribute {name!r}")
    return getattr(importlib.import_module("zoft.train" if name == "ZOTrainer" else "zoft.optim"), name)
