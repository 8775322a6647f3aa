"""The module that a model's logits come from, found by running it on a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim.placement import device_of, is_hooked, is_sharded
from zoft.optim.products import WideLinear


def find_head(model: Any) -> nn.Linear | None:
    """The linear head of a transformers `model`, if it returns what the head gives, as it is; else None.

    Nor is a head told of whose weight is not in place between forwards, or whose output looks like its input.
    """
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, WideLinear) or head.in_features == head.out_features:
        return None
    if is_sharded(head.weight) or is_hooked(model):
        return None
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with torch.no_grad():
            tokens = torch.arange(1, min(5, head.out_features), device=device_of(model)).unsqueeze(0)
            logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    same = len(seen) == 1 and seen[0].dtype == logits.dtype and torch.equal(seen[0], logits)
    return head if same and bool(logits.any()) else None
