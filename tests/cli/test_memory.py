"""``--memory``: a model larger than its device, most of it on the disk, trained as if it were in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file

from zoft.train.models import load_model

from .conftest import Outcome

LITTLE = "120KB"  # of the tiny model's 147


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_little_of_the_model_is_in_memory(model: Path) -> None:
    loaded: Any = load_model(str(model), device="cpu", memory=LITTLE)[0]
    here = sum(p.numel() * p.element_size() for p in loaded.parameters() if not p.is_meta)
    assert 0 < here <= 120_000 and any(p.is_meta for p in loaded.parameters())


@pytest.mark.parametrize(("method", "memory"), [("auto", LITTLE), ("zo-act", LITTLE), ("auto", "1KB")])
def test_the_run_is_that_of_the_model_in_memory(
    method: str, memory: str, train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Bit for bit, but for the order in which guided adds up rows; and what comes out is measured again so."""
    runs = tmp_path / "whole", tmp_path / "little"
    flags = ["--method", method, "--lr", "0.03", "--json"]
    whole, little = (
        train(*flags, *more, out=out).json() for out, more in zip(runs, ([], ["--memory", memory]), strict=True)
    )
    assert little["best"] == whole["best"] and little["final"] == whole["final"]
    tensors = [adapter_of(run) for run in runs]
    assert tensors[0].keys() == tensors[1].keys()
    rounding = {"rtol": 1e-3, "atol": 1e-4} if method == "auto" else {"rtol": 0, "atol": 0}
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, **rounding)
    again = [zoft("eval", runs[1], *more, "--json").json() for more in ([], ["--memory", memory])]
    assert again[0]["accuracy"] == again[1]["accuracy"] and again[0]["loss"] == pytest.approx(again[1]["loss"])


def test_an_adapter_is_trained_on(
    train: Callable[..., Outcome], zoft: Callable[..., Outcome], data: Path, tmp_path: Path
) -> None:
    """From where it was, beside offloaded weights, to the bits that it comes to beside those in memory."""
    short = ["--steps", 2, "--eval-steps", 2, "--batch-size", 8]
    flags = ["--task", "sst2", "--data", data, "--device", "cpu", "--method", "zo-act", *short]
    assert train("--method", "zo-act").code == 0
    found = []
    for name, more in {"whole": [], "little": ["--memory", LITTLE]}.items():
        out = tmp_path / name
        done = zoft("train", tmp_path / "run", *flags, "--out", out, *more)
        assert done.code == 0, done.err
        found.append(adapter_of(out))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_cannot_be_is_one_line(train: Callable[..., Outcome], tmp_path: Path) -> None:
    for flags, reason in {
        ("--method", "agzo", "--memory", LITTLE): "offloaded",
        ("--method", "fo-adamw", "--memory", "auto"): "needs all weights in place",
        ("--memory", "much"): "memory must be auto or a size such as 4GiB",
    }.items():
        done = train(*flags)
        assert done.code == 2 and reason in done.err and done.err.count("\n") == 1, done.err
        assert not (tmp_path / "run").exists()


def test_of_adapters_a_lora_alone(zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path) -> None:
    base = load_model(str(model), device="cpu")[0]
    get_peft_model(base, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    done = zoft("eval", tmp_path / "ia3", "--task", "sst2", "--data", data, "--device", "cpu", "--memory", LITTLE)
    assert done.code == 2 and "must be a LoRA" in done.err and done.err.count("\n") == 1
