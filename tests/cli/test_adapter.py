"""``zoft train`` on a run that left an adapter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .conftest import Outcome


@pytest.fixture
def adapter(train: Callable[..., Outcome], tmp_path: Path) -> Path:
    """A run of ZO-Act."""
    out = tmp_path / "first"
    assert train("--method", "zo-act", "--lr", "0.1", out=out).code == 0
    return out


@pytest.mark.parametrize("method", ["auto", "guided", "zo-act", "agzo", "mezo", "fo-adamw"])
def test_it_goes_on_from_there(
    method: str, adapter: Path, zoft: Callable[..., Outcome], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "second"
    done = zoft(
        "train", adapter, "--method", method, "--task", "sst2", "--data", data, "--steps", 4, "--eval-steps", 2,
        "--batch-size", 8, "--guard", "--out", out, "--json",
    )  # fmt: skip
    summary, first = done.json(), json.loads((adapter / "summary.json").read_text())
    assert summary["initial"] == first["best"]
    old, new = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (adapter, out))
    assert old.keys() <= new.keys()
    assert zoft("eval", out, "--json").json()["accuracy"] == summary["best"]


def test_lora_adds_no_second_one(adapter: Path, zoft: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    done = zoft("train", adapter, "--method", "lora", "--task", "sst2", "--data", data, "--out", tmp_path / "second")
    assert done.code == 2
    assert "the model is an adapter already: fo-adamw trains it" in done.err
