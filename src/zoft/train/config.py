"""The configuration of a run: one flat dataclass, read from YAML and flags, written back complete."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zoft.data import Task, custom_task, load_task, parse_words
from zoft.errors import UserError
from zoft.train.optimizers import method_options, require_method


@dataclass
class TrainConfig:
    """Everything that determines a run. None for `lr` and `eps` means the method's own default."""

    model: str
    task: str | None = None
    data: str | None = None
    template: str | None = None
    words: str | None = None
    label: str | None = None
    metric: str | None = None

    method: str = "agzo"
    lr: float | None = None
    eps: float | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0

    steps: int = 300
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    max_length: int | None = None

    train_examples: int | None = None
    dev_examples: int = 200
    eval_examples: int | None = None
    eval_batch_size: int = 32
    eval_steps: int = 50
    save_steps: int | None = None
    log_steps: int = 10
    out: str = "runs/zoft"

    def __post_init__(self) -> None:
        require_method(self.method)
        self.method_options = method_options(self.method, self.method_options)
        self.lr = self.method_options.pop("lr") if self.lr is None else self.lr
        self.eps = self.method_options.pop("eps", None) if self.eps is None else self.eps
        for unused in ("lr", "eps"):
            self.method_options.pop(unused, None)
        self._check()

    def load_task(self) -> Task:
        """The task named by `task`, or the one that `template`, `words` and `label` describe."""
        if self.task is not None:
            return load_task(self.task)
        words = parse_words(self.words) if self.words is not None else None
        return custom_task(self.template, words, self.label, self.metric)

    def save(self, path: Path) -> None:
        """Write every field as YAML."""
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | None, **flags: Any) -> TrainConfig:
        """`flags` that are not None, over the file `path`, over the defaults.

        Raises:
            UserError: the file cannot be read, or a value is unknown, of the wrong type, or out of its range.
        """
        values = read_yaml(path) if path is not None else {}
        options = {**(values.get("method_options") or {}), **(flags.pop("method_options", None) or {})}
        values |= {name: value for name, value in flags.items() if value is not None}
        known = typing.get_type_hints(cls)
        where = f" in {path}" if path is not None else ""
        for name, value in values.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise UserError(f"unknown setting {name!r}{where}" + (f"; did you mean {close[0]}?" if close else ""))
            values[name] = _as_type(name, value, known[name])
        if not values.get("model"):
            raise UserError("no model: name one, such as demo, a hub id, a folder or a .gguf file")
        if not values.get("task") and not values.get("data"):
            raise UserError("nothing to train on: give --task NAME (see zoft tasks), or --data FILE")
        return cls(**{**values, "method_options": options})

    def _check(self) -> None:
        at_least = {"steps": 1, "batch_size": 1, "accumulate": 1, "dev_examples": 1, "eval_batch_size": 1}
        at_least |= {"eval_steps": 1, "log_steps": 1, "warmup_steps": 0, "seed": 0, "save_steps": 1}
        at_least |= {"train_examples": 1, "eval_examples": 1, "max_length": 8}
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"{name} must be at least {lowest}, not {value}")
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be a number of at least 0, not {value}")
        if self.eps == 0:
            raise UserError("eps must be above 0: it is the distance at which the loss is probed")
        if self.save_steps is not None and self.save_steps % self.eval_steps:
            raise UserError(
                f"save_steps ({self.save_steps}) must be a multiple of eval_steps ({self.eval_steps}), "
                "so that the best evaluated model is among the saved ones"
            )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if there is none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"config file {path} holds no settings of the form name: value")
    return values


def _as_type(name: str, value: Any, hint: Any) -> Any:
    """`value`, if it is (or reads as) a `hint`; YAML reads 1e-4 as text, so numbers are read here."""
    if value is None:
        return value
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(k for k in kinds if k is not types.NoneType)
    kind = typing.get_origin(kind) or kind
    if kind in (int, float) and not isinstance(value, bool):
        try:
            return kind(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kind):
        return value
    raise UserError(f"{name} must be of type {kind.__name__}, not {value!r}")
