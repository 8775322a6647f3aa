"""``--dtype int8`` and ``nf4``: training beside weights that are quantized as they are loaded."""

import copy
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.models import build
from scripts import ROOT
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


def test_the_documents_path_from_a_file_to_an_answer(
    zoft: Callable[..., Outcome],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every block of docs/quantized.md, in order; added are a few more rows, and that the runs are short."""
    text = (ROOT / "docs" / "quantized.md").read_text(encoding="utf-8").replace("Qwen/Qwen3-0.6B", str(model))
    rows, shell, python = (block for _, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text(rows * 20)
    commands = [shlex.split(line)[1:] for line in shell.splitlines() if line.startswith("zoft ")]
    assert [command[0] for command in commands] == ["train", "train", "eval"]
    for command in commands:
        short = ["--steps", 4, "--eval-steps", 2, "--batch-size", 4] if command[0] == "train" else []
        done = zoft(*command, *short, "--device", "cpu")
        assert done.code == 0, done.err
    names: dict[str, Any] = {}
    exec(python, names)
    assert "What colour is the sky?" in capfd.readouterr().out
    loaded, question = names["model"], names["question"]
    with torch.no_grad():
        trained = loaded(**question).logits
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(**question).logits, trained)


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


@pytest.mark.parametrize("method", ["agzo", "mezo", "fo-adamw"])
def test_writers_are_refused_beside_weights_saved_quantized(
    method: str, zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path
) -> None:
    loaded, tokenizer = load_model(str(model), dtype="nf4")
    for part in (loaded, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    done = zoft("train", tmp_path / "saved", "--task", "sst2", "--data", data, "--method", method, "--steps", 2)
    assert done.code == 2 and f"method {method}" in done.err and "cannot be written" in done.err


@pytest.mark.parametrize("command", ["align", "doctor"])
def test_there_is_no_gradient_to_compare_with(
    command: str, zoft: Callable[..., Outcome], model: Path, data: Path
) -> None:
    rows = ["--task", "sst2", "--data", data, "--batch-size", 4, "--dtype", "int8"]
    own = ["--methods", "zo-act"] if command == "align" else ["--method", "zo-act", "--directions", 2, "--gradient"]
    done = zoft(command, model, *rows, *own)
    assert done.code == 2 and done.err.count("\n") == 1
    assert "has a quantized weight, which has no gradient: load it with dtype float32" in done.err


@pytest.mark.parametrize("command", ["align", "export"])
def test_an_adapter_is_not_added_to_quantized_weights(
    command: str, train: Callable[..., Outcome], zoft: Callable[..., Outcome], data: Path, tmp_path: Path
) -> None:
    assert train("--method", "zo-act").code == 0
    own = ["--task", "sst2", "--data", data, "--methods", "zo-act", "--batch-size", 4]
    own = own if command == "align" else ["--to", "merged", "--out", tmp_path / "merged"]
    done = zoft(command, tmp_path / "run", *own, "--dtype", "int8")
    assert done.code == 2 and "its weight cannot take an update; unless it was saved so" in done.err


def test_the_package_that_is_missing_is_named(train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    done = train("--method", "zo-act", "--dtype", "int8")
    assert done.code == 2 and "dtype int8 needs torchao: pip install torchao" in done.err
