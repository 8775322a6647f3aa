"""A mixture of experts through the command line: trained, evaluated, exported, trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from optim.models import GROUPED, build, changed, snapshot
from train.tiny import TOKENIZER
from zoft.train.models import load_model

from .conftest import Outcome

TOKENS = torch.arange(3, 23).view(2, 10)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    own = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256}
    routed = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    folder = tmp_path / "mixture"
    build(Qwen3MoeConfig(**GROUPED | own | routed, head_dim=8)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["zo-act", "agzo"])
def test_what_experts_learn_is_kept(
    method: str, mixture: Path, zoft: Callable[..., Outcome], data: Path, tmp_path: Path
) -> None:
    few = ["--task", "sst2", "--data", data, "--steps", 4, "--eval-steps", 2, "--batch-size", 8, "--device", "cpu"]
    few += ["--method", method, "--lr", "0.1", "-o", "include=*.experts.*", "--dtype", "float32", "--json"]
    run, on, merged, adapter = (tmp_path / name for name in ("run", "on", "merged", "adapter"))
    summary = zoft("train", mixture, *few, "--out", run).json()
    assert zoft("eval", run, "--json").json()["accuracy"] == summary["best"]

    assert zoft("export", run, "--to", "merged", "--out", merged, "--json").code == 0
    learned = logits(load_model(str(run))[0])
    plain = AutoModelForCausalLM.from_pretrained(mixture)
    assert not torch.allclose(logits(plain), learned, atol=1e-3)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), learned, rtol=1e-4, atol=1e-5)
    names = changed(AutoModelForCausalLM.from_pretrained(merged), snapshot(plain))
    assert names and all(".experts." in name for name in names)

    found = zoft("export", run, "--to", "peft", "--rank", 32, "--out", adapter, "--json").json()
    assert found["left_out"] == []
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, adapter)), learned, rtol=1e-3, atol=1e-4)

    assert zoft("train", run, *few, "--out", on).json()["initial"] == summary["best"]


def test_auto_goes_on_from_what_experts_have_learned(
    mixture: Path, zoft: Callable[..., Outcome], data: Path, tmp_path: Path
) -> None:
    """By ZO-Act, though the model has a stream for guided, which does not reach them."""
    run, on = tmp_path / "run", tmp_path / "on"
    few = [
        "--task",
        "sst2",
        "--data",
        data,
        "--steps",
        2,
        "--batch-size",
        8,
        "--lr",
        "0.01",
        "--device",
        "cpu",
        "--json",
    ]
    assert zoft("train", mixture, *few, "--out", tmp_path / "auto").json()["method"] == "guided"
    assert zoft("train", mixture, *few, "--method", "zo-act", "--out", run).code == 0
    assert zoft("train", run, *few, "--eps", "1e-3", "--out", on).json()["method"] == "zo-act"
    refused = zoft("train", run, *few, "--method", "guided", "--out", tmp_path / "guided")
    assert refused.code == 2 and "take zo-act" in " ".join(refused.err.split())


def test_experts_on_the_disk_learn_what_those_in_memory_do(
    mixture: Path, zoft: Callable[..., Outcome], data: Path, tmp_path: Path
) -> None:
    """Once those that are loaded as they are needed stayed still. The run is evaluated, and goes on, from there too."""
    runs, memory = [tmp_path / "whole", tmp_path / "little"], ["--memory", "1KB"]
    few = ["--task", "sst2", "--data", data, "--steps", 2, "--batch-size", 8, "--lr", "0.1", "--device", "cpu"]
    few += ["--method", "zo-act", "--dtype", "float32"]
    for run, more in zip(runs, ([], memory), strict=True):
        assert zoft("train", mixture, *few, *more, "--out", run).code == 0
    whole, little = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert sum(".experts." in name for name in whole) == 8 and whole.keys() == little.keys()
    assert all(torch.equal(whole[name], little[name]) for name in whole)

    there, here = (zoft("eval", runs[1], *more, "--json").json() for more in (memory, []))
    assert there["accuracy"] == here["accuracy"] and there["loss"] == pytest.approx(here["loss"], rel=1e-5)
    assert zoft("train", runs[1], *few, *memory, "--out", tmp_path / "on").code == 0
    refused = zoft("train", runs[1], *few, *memory, "--method", "mezo", "--out", tmp_path / "mezo")
    assert refused.code == 2 and "leave memory out" in " ".join(refused.err.split())
