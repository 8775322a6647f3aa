"""What products with half-precision weights are computed in, settled once a model is there."""

from __future__ import annotations

from typing import Any

import torch

from zoft.optim.products import HALVES, float32_is_quicker, widen
from zoft.train.config import ComputeDtype
from zoft.train.processes import agreed


def settle_arithmetic(model: Any, wanted: ComputeDtype = "auto") -> ComputeDtype:
    """Have the linear layers of `model` compute in the dtype that is `wanted`, and return what that came to.

    ``weights`` is that of the weights, ``float32`` means float32 products with half-precision weights
    (`zoft.optim.products`), and ``auto`` that of both which a short measurement finds quicker on a CPU; elsewhere it is
    ``weights``. Processes go by the first one's measurement.
    """
    if wanted == "auto":
        half = model.dtype if model.dtype in HALVES else torch.bfloat16  # autocast's, which first-order methods take
        wide = model.device.type == "cpu" and float32_is_quicker(half)
        wanted = agreed("float32" if wide else "weights")
    if wanted == "float32":
        widen(model)
    return wanted
