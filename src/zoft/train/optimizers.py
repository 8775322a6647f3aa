"""From a method's name and options to an optimizer: zeroth-order presets and first-order references."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, TaskType, get_peft_model

from zoft.errors import UserError
from zoft.optim import METHODS

if TYPE_CHECKING:
    from zoft.train.config import TrainConfig

# Options and defaults of the first-order references; learning rates as usual for full and LoRA fine-tuning.
FIRST_ORDER: dict[str, dict[str, Any]] = {
    "fo-sgd": {"lr": 1e-2, "momentum": 0.0},
    "fo-adamw": {"lr": 1e-5},
    "lora": {"lr": 1e-3, "rank": 8, "alpha": 16},
}


def method_names() -> list[str]:
    """Every name that ``--method`` takes."""
    return [*METHODS, *FIRST_ORDER]


def require_method(name: str) -> None:
    """Raises UserError, with the nearest name, if there is no such method."""
    names = method_names()
    if name not in names:
        close = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}"
        raise UserError(f"unknown method {name!r}; {hint}")


def method_options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All options of method `name` (lr and eps among them): `given` over its defaults.

    Raises:
        UserError: the method has no such option.
    """
    if name in FIRST_ORDER:
        defaults = FIRST_ORDER[name]
    else:
        parameters = inspect.signature(METHODS[name]).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        defaults = {"include": (), "exclude": (), "linear": ()} | defaults
    for option in given:
        if option not in defaults:
            close = difflib.get_close_matches(option, defaults, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(defaults)}"
            raise UserError(f"method {name} has no option {option!r}; {hint}")
    merged = {**defaults, **given}
    return {option: list(value) if isinstance(value, tuple) else value for option, value in merged.items()}


def build(config: TrainConfig, model: Any) -> tuple[Any, torch.optim.Optimizer]:
    """The model to train (wrapped, for LoRA) and its optimizer.

    Raises:
        UserError: an option's value is refused by the method.
    """
    options: dict[str, Any] = {**config.method_options, "lr": config.lr, "weight_decay": config.weight_decay}
    if config.method == "lora":
        lora = LoraConfig(
            r=options.pop("rank"),
            lora_alpha=options.pop("alpha"),
            target_modules="all-linear",
            task_type=TaskType.CAUSAL_LM,
        )
        model = get_peft_model(model, lora)
    if config.method in FIRST_ORDER:
        kind = torch.optim.SGD if config.method == "fo-sgd" else torch.optim.AdamW
        return model, kind([p for p in model.parameters() if p.requires_grad], **options)
    try:
        return model, METHODS[config.method](model, eps=config.eps, seed=config.seed, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"method {config.method}: {error}") from error
