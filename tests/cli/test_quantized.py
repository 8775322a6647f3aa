"""``--dtype int8`` and ``nf4``: training beside weights that are quantized as they are loaded."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.models import build
from train.tiny import FAMILIES, TOKENIZER
from zoft.train.models import QUANTIZED, load_model

from .conftest import Outcome


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model whose layers are as large as a block of 64 weights."""
    folder, config = tmp_path_factory.mktemp("models") / "wide", copy.deepcopy(FAMILIES["llama"])
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    build(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["auto", "zo-act", "lora"])
@pytest.mark.parametrize("dtype", QUANTIZED)
def test_an_adapter_is_trained(
    dtype: str, method: str, train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    summary = train("--method", method, "--dtype", dtype, "--json").json()
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    again = zoft("eval", tmp_path / "run", "--json").json()["accuracy"]
    assert again == pytest.approx(summary["best"], abs=1.5 / 21)  # PEFT rounds elsewhere: a row may turn on it


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_the_linear_layers_are_quantized(dtype: str, model: Path) -> None:
    loaded = load_model(str(model), dtype=dtype)[0]
    block: Any = loaded.model.layers[0]
    assert type(block.mlp.down_proj.weight) is not torch.nn.Parameter
    assert block.input_layernorm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["agzo", "mezo", "fo-adamw"])
def test_writers_are_refused(method: str, train: Callable[..., Outcome]) -> None:
    done = train("--method", method, "--dtype", "nf4")
    assert done.code == 2 and "take guided, zo-act" in done.err


def test_the_package_that_is_missing_is_named(train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    done = train("--method", "zo-act", "--dtype", "int8")
    assert done.code == 2 and "dtype int8 needs torchao: pip install torchao" in done.err
