"""Coefficients as a PEFT adapter: ``x W^T + (x V) C^T`` is LoRA with ``lora_A = V^T`` and ``lora_B = C``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, TaskType
from safetensors.torch import save_file

from zoft.errors import UserError
from zoft.optim import ZeroOrder


def save_adapter(optimizer: ZeroOrder, folder: Path) -> None:
    """Write the optimizer's coefficients as a LoRA adapter (float32) that `peft.PeftModel.from_pretrained` loads.

    ``lora_alpha`` equals the rank, so that PEFT's scaling is 1. A layer whose basis is smaller than the others'
    (too few tokens, or too narrow an input) has its own rank in ``rank_pattern``.

    Raises:
        UserError: there are no coefficients: no estimate was made, or none had a finite loss.
    """
    trained = {name: factor for name, factor in optimizer.coefficients.items() if name in optimizer.updates}
    ranks = {name: factor.shape[1] for name, factor in trained.items()}
    if not ranks:
        raise UserError("there are no coefficients to save: no estimate so far had a finite loss")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    different = {name: r for name, r in ranks.items() if r != rank}
    model = optimizer.model
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=different,
        alpha_pattern=different,
        target_modules=sorted(ranks),
        fan_in_fan_out=any(m.transposed for m in optimizer.maps),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=getattr(model, "name_or_path", None),
        inference_mode=True,
    )
    tensors = {}
    for name, factor in trained.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = (
            optimizer.bases[name].t().cpu().clone(memory_format=torch.contiguous_format)
        )
        tensors[f"{prefix}.lora_B.weight"] = factor.cpu().clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
