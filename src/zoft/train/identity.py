"""What makes a run the run that it is: the model it begins with, its rows, and the settings its steps depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from zoft import __version__
from zoft.data import Row
from zoft.errors import UserError
from zoft.optim.placement import loaded_parameter
from zoft.train.config import TrainConfig

# The order of the rows follows from their digest and these settings, `steps` among them unless train_examples is set.
SETTINGS = {"method", "method_options", "eps", "weight_decay", "objective", "samples", "max_new_tokens", "seed"}
SETTINGS |= {"batch_size", "accumulate", "train_examples", "dev_examples", "max_length", "dtype"}
MEANING = {"model": "the weights of the model", "rows": "the training rows"}


def identity(config: TrainConfig, model: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The identity of the run of `config` that begins with the model of this digest and draws from training `rows`."""
    found = {"zoft_version": __version__, "model": model, "rows": rows_digest(rows), "steps": config.steps}
    return found | settings(config)


def settings(config: TrainConfig) -> dict[str, Any]:
    """Those of `SETTINGS`, as JSON has them; not how processes share a step, which is the same step."""
    found = {name: value for name, value in asdict(config).items() if name in SETTINGS}
    found["method_options"].pop("parallel", None)
    return json.loads(json.dumps(found))  # tuples are lists


def require_same(now: dict[str, Any], then: dict[str, Any], where: object) -> None:
    """Raises UserError if the identity `then`, found in `where`, is of another run than `now`."""
    for name in ("model", "rows"):
        if name in now and now[name] != then.get(name):
            raise UserError(f"{where} is of another run: {MEANING[name]} are not those that it began with")
    for name in sorted(SETTINGS):
        if name in now and now[name] != then.get(name):
            raise UserError(f"{where} is of another run: its {name} was {then.get(name)}, and now is {now[name]}")


def model_digest(model: nn.Module) -> str:
    """A hash of names, dtypes, shapes and values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        for part in _plain(loaded_parameter(model, name) if parameter.is_meta else parameter.data):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)};".encode())
            digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rows_digest(rows: Sequence[Row]) -> str:
    """A hash of `rows` in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _plain(tensor: Tensor) -> list[Tensor]:
    """`tensor`, or the tensors that a quantized one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _plain(getattr(tensor, name))]
