"""From a method's name and options to an optimizer: zeroth-order presets and first-order references."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from zoft.errors import UserError, near_miss
from zoft.optim import METHODS, ZeroOrder
from zoft.train.adapter import Factors, not_loaded, peft_runs, start_from, take_apart
from zoft.train.values import as_type

if TYPE_CHECKING:
    from zoft.train.config import TrainConfig

# Options and defaults of the first-order references; learning rates as usual for full and LoRA fine-tuning.
FIRST_ORDER: dict[str, dict[str, Any]] = {
    "fo-sgd": {"lr": 1e-2, "momentum": 0.0, "include": ()},
    "fo-adamw": {"lr": 1e-5, "include": ()},
    "lora": {"lr": 1e-3, "rank": 8, "alpha": 16},
}
PATTERNS = ("include", "exclude", "linear")
# What every zeroth-order method takes, and of which type it is.
COMMON: dict[str, Any] = dict.fromkeys(PATTERNS, ())
COMMON |= {"clip": None, "normalise": False, "probe_batching": False, "fold_every": 1, "parallel": "data"}
COMMON_HINTS = dict.fromkeys(PATTERNS, Sequence[str]) | {
    "clip": float | None,
    "normalise": bool,
    "probe_batching": bool | Literal["auto"],
    "fold_every": int,
    "parallel": int | Literal["data", "probes"],
}
COEFFICIENTS = ("guided", "zo-act")  # methods that train them, beside frozen weights
AUTO = "auto"  # which of them it is follows from the model (zoft.train.auto)


def method_names() -> list[str]:
    """Every name that ``--method`` takes."""
    return [AUTO, *METHODS, *FIRST_ORDER]


def require_method(name: str) -> None:
    """Raises UserError, with the nearest name, if there is no such method."""
    if name not in method_names():
        raise UserError(f"unknown method {name!r}; {near_miss(name, method_names())}")


def usual_schedule(name: str) -> str:
    """The schedule of the learning rate that method `name` is meant with."""
    return "linear" if name == "guided" else "constant"


def method_options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All options of method `name` (lr and eps among them): `given` over its defaults.

    Raises:
        UserError: the method has no such option, or it is of another type; or it is `AUTO`.
    """
    if name == AUTO:
        raise UserError("method auto is settled when zoft train looks at the model: here, name the method")
    if name in FIRST_ORDER:
        defaults = FIRST_ORDER[name]
        hints: dict[str, Any] = {option: type(value) for option, value in defaults.items()}
    else:
        method = METHODS[name]
        parameters = inspect.signature(method).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        defaults = COMMON | defaults
        preset: Any = getattr(method, "func", method)  # of a partial
        hints = COMMON_HINTS | get_type_hints(preset.__init__)
    for option in given:
        if option not in defaults:
            raise UserError(f"method {name} has no option {option!r}; {near_miss(option, defaults)}")
    return {option: as_type(option, value, hints[option]) for option, value in (defaults | given).items()}


def zero_order(name: str, model: Any, options: dict[str, Any]) -> ZeroOrder:
    """The zeroth-order optimizer `name` for `model`.

    Raises:
        UserError: the method refuses a value, or the model.
    """
    try:
        return METHODS[name](model, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"method {name}: {error}") from error


def zero_order_of(config: TrainConfig, model: Any, adapter: Factors | None = None) -> ZeroOrder:
    """The zeroth-order optimizer of `config` for `model`, beginning with what an `adapter` adds to it.

    Raises:
        UserError: its method is first-order or `AUTO`, or refuses a value, the model, or the adapter.
    """
    method_options(config.method, {})
    if config.method in FIRST_ORDER:
        raise UserError(f"{config.method} is first-order: it draws no directions")
    options = {**config.method_options, "lr": config.lr, "weight_decay": config.weight_decay, "seed": config.seed}
    options |= loadable(config.method, model, config.method_options)
    optimizer = zero_order(config.method, model, options | ({} if config.eps is None else {"eps": config.eps}))
    if adapter:
        start_from(optimizer, adapter)
    return optimizer


def loadable(method: str, model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with which the coefficients of `method` are an adapter of `model` that PEFT loads."""
    refused = not_loaded(model) if method in COEFFICIENTS and options.get("into") != "weights" else ()
    if not refused:
        return options
    return options | {"exclude": (*method_options(method, options)["exclude"], *refused)}


def to_train(method: str, model: Any) -> tuple[Any, Factors]:
    """What `method` trains of `model`, and the adapter that it begins with.

    Of an adapted model, methods that keep coefficients go on from the adapter's; others train its own parameters.

    Raises:
        UserError: the method cannot go on from the adapter.
    """
    if method in (AUTO, *COEFFICIENTS) and isinstance(model, PeftModel):
        return take_apart(model)
    if not peft_runs(model):
        raise UserError(
            "beside offloaded weights, PEFT cannot run what an adapter adds to experts: zo-act goes on from it, or "
            "leave memory out"
        )
    return model, {}


def build(config: TrainConfig, model: Any, adapter: Factors | None = None) -> tuple[Any, torch.optim.Optimizer]:
    """The model to train (wrapped, for LoRA) and its optimizer, as `zero_order_of`.

    Raises:
        UserError: the method refuses a value, the model, or the adapter.
    """
    quantized = getattr(model, "is_quantized", False) and not isinstance(model, PeftModel)
    if quantized and config.method in ("mezo", "fo-sgd", "fo-adamw"):  # the others look at the layers that they train
        raise UserError(f"method {config.method}: {config.model} has quantized weights, which cannot be written")
    if config.method not in FIRST_ORDER:
        return model, zero_order_of(config, model, adapter)
    options: dict[str, Any] = {**config.method_options, "lr": config.lr, "weight_decay": config.weight_decay}
    try:
        if config.method == "lora":
            if isinstance(model, PeftModel):
                raise ValueError("the model is an adapter already: fo-adamw trains it")
            lora = LoraConfig(
                r=options.pop("rank"),
                lora_alpha=options.pop("alpha"),
                target_modules="all-linear",
                task_type=TaskType.CAUSAL_LM,
            )
            model = get_peft_model(model, lora)
        if include := options.pop("include", ()):
            left = [p for name, p in model.named_parameters() if not any(fnmatchcase(name, one) for one in include)]
            for parameter in left:
                parameter.requires_grad_(False)
            if not any(p.requires_grad for p in model.parameters()):
                raise ValueError(f"no parameter is named like {', '.join(include)}")
        kind = torch.optim.SGD if config.method == "fo-sgd" else torch.optim.AdamW
        return model, kind([p for p in model.parameters() if p.requires_grad], **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"method {config.method}: {error}") from error
