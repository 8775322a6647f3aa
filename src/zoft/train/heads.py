"""Heads that a pretrained model comes without, such as a classifier's: an adapter has to hold them whole.

They are made at random, and so would others be when the adapter is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import TaskType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoft.optim.layers import as_linear_map
from zoft.train.stacks import Factors

FILE = "heads.safetensors"  # as they were before training
TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}


def task_of(model: Any) -> TaskType | None:
    """What PEFT is to make of `model`, None for nothing but itself."""
    for name, task in TASKS.items():
        if type(model).__name__.endswith(name):
            return task
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM


def heads_of(model: Any) -> dict[str, nn.Module]:
    """The heads of `model` by name: what a classifier has beside the pretrained model in it."""
    if task_of(model) not in TASKS.values():
        return {}
    children = model.named_children()
    return {name: child for name, child in children if child is not model.base_model and [*child.parameters()]}


def learned(model: Any, factors: Factors) -> dict[str, Tensor]:
    """The tensors of the heads of `model` by name, with what `factors` add to their layers in them."""
    tensors = {}
    for head, module in heads_of(model).items():
        for name, tensor in module.state_dict().items():
            path = f"{head}.{name}"
            layer, _, kind = path.rpartition(".")
            if layer in factors and kind == "weight":
                basis, factor = factors[layer]
                change = (factor @ basis.t()).to(tensor.device)
                linear = as_linear_map(layer, model.get_submodule(layer))
                tensor = tensor + (change.t() if linear and linear.transposed else change).to(tensor.dtype)
            tensors[path] = tensor.cpu().clone()
    return tensors


def save_heads(model: Any, folder: Path) -> None:
    """Write the heads of `model` as they are, without what lies beside their layers, if it has any."""
    if tensors := learned(model, {}):
        save_file(tensors, folder / FILE)


def load_heads(model: Any, folder: Path) -> None:
    """Give `model` the heads that `save_heads` has written, if it has any.

    Raises:
        RuntimeError: they are of another model.
    """
    heads = heads_of(model)
    tensors = load_file(folder / FILE) if heads else {}
    for name, head in heads.items():
        prefix = f"{name}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        head.load_state_dict(own)
