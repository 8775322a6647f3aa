"""``zoft export``: what comes out computes what the run computed."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from zoft.train.export import _reordered
from zoft.train.models import _demo_file, load_model, resolve

from .conftest import Outcome

TOKENS = torch.arange(3, 23).view(2, 10)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(TOKENS).logits


@pytest.fixture
def run(train: Callable[..., Outcome], tmp_path: Path) -> Callable[[str], Path]:
    """The folder of a run of a method."""

    def make(method: str) -> Path:
        out = tmp_path / method
        assert train("--method", method, "--lr", "0.03", out=out).code == 0
        return out

    return make


@pytest.mark.parametrize("method", ["zo-act", "guided", "agzo"])
def test_merged(method: str, run: Callable[[str], Path], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    folder, merged = run(method), tmp_path / "merged"
    found = zoft("export", folder, "--to", "merged", "--out", merged, "--json").json()
    assert found["rounding"] < 1e-4
    expected = logits(load_model(str(folder))[0])
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(merged)), expected, atol=1e-5)


def test_rounding_is_told(run: Callable[[str], Path], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = run("zo-act")
    done = zoft("export", folder, "--to", "merged", "--dtype", "bfloat16", "--out", tmp_path / "merged")
    assert done.code == 0 and "rounding has cost" in " ".join(done.out.split())  # a long path wraps the line
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert saved.dtype == torch.bfloat16


def test_full_weights_become_an_adapter(
    run: Callable[[str], Path], zoft: Callable[..., Outcome], model: Path, tmp_path: Path
) -> None:
    folder = run("agzo")
    energies = []
    for rank in (1, 64):
        found = zoft("export", folder, "--to", "peft", "--rank", rank, "--out", tmp_path / f"r{rank}", "--json").json()
        energies.append(found["energy"])
        assert found["left_out"] == []
    assert energies[0] < 0.99 < energies[1] <= 1.0001
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "r64")
    assert torch.allclose(logits(adapted), logits(load_model(str(folder))[0]), atol=1e-5)


def test_what_no_adapter_holds_is_named(
    run: Callable[[str], Path], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    found = zoft("export", run("mezo"), "--to", "peft", "--out", tmp_path / "peft", "--json").json()
    assert "model.norm.weight" in found["left_out"]
    assert "model.layers.0.mlp.up_proj.weight" not in found["left_out"]


@pytest.mark.parametrize("method", ["guided", "agzo"])
def test_gguf_lora(method: str, run: Callable[[str], Path], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    """The file holds the adapter under llama.cpp's names, with the scale that alpha and rank leave."""
    folder, file, peft = run(method), tmp_path / "lora.gguf", tmp_path / "peft"
    assert zoft("export", folder, "--to", "gguf-lora", "--out", file).code == 0
    assert zoft("export", folder, "--to", "peft", "--out", peft).code == 0
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = [fields[name] for name in ("general.architecture", "general.type", "adapter.type")]
    assert kind == ["llama", "adapter", "lora"]
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    saved = load_file(peft / "adapter_model.safetensors")
    assert len(found) == len(saved)
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    up, down = found["blk.1.ffn_down.weight.lora_b"], found["blk.1.ffn_down.weight.lora_a"]
    update = fields["adapter.lora.alpha"] / down.shape[0] * up @ down
    expected = saved[f"{prefix}.lora_B.weight"] @ saved[f"{prefix}.lora_A.weight"]
    assert np.allclose(update, expected.numpy(), atol=1e-6)


def test_queries_and_keys_lie_as_in_llama_cpp() -> None:
    """Reordered, the rows of transformers' matrices are those of the .gguf that they were read from."""
    model = AutoModelForCausalLM.from_pretrained(resolve("demo"))
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(_demo_file()).tensors}
    names = {"q_proj": "blk.3.attn_q.weight", "k_proj": "blk.3.attn_k.weight", "o_proj": "blk.3.attn_output.weight"}
    for layer, name in names.items():
        stored = gguf.dequantize(raw[name].data, raw[name].tensor_type)
        weight = model.model.layers[3].self_attn.get_submodule(layer).weight.detach().float()
        reordered = _reordered(f"model.layers.3.self_attn.{layer}", weight, model.config)
        assert torch.allclose(reordered, torch.from_numpy(stored), rtol=0.01, atol=1e-3)
        assert torch.equal(reordered, weight) == (layer == "o_proj")


def test_a_run_of_a_device_that_is_not_here(
    run: Callable[[str], Path], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Once its full weights could not be exported: the run's settings were refused."""
    config = run("agzo") / "config.yaml"
    config.write_text(config.read_text().replace("device: cpu", "device: cuda:99"))
    done = zoft("export", config.parent, "--to", "peft", "--out", tmp_path / "peft")
    assert done.code == 0, done.err


def test_mistakes(run: Callable[[str], Path], zoft: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    folder, taken = run("zo-act"), tmp_path / "taken"
    taken.mkdir()
    for kind in ("merged", "peft", "gguf-lora"):
        done = zoft("export", folder, "--to", kind, "--out", taken)
        assert done.code == 2 and "is there already: choose another --out" in done.err
    done = zoft("export", model, "--to", "peft", "--out", tmp_path / "new")
    assert done.code == 2 and "give --base" in done.err
    done = zoft("export", model, "--to", "peft", "--base", model, "--out", tmp_path / "new")
    assert done.code == 2 and "no linear layer" in done.err
    assert not (tmp_path / "new").exists()


def test_a_lora_file_is_whole_or_not_there(
    run: Callable[[str], Path], zoft: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while it is written."""

    def full(writer: gguf.GGUFWriter) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = run("zo-act")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    done = zoft("export", folder, "--to", "gguf-lora", "--out", tmp_path / "files" / "lora.gguf")
    assert done.code == 2 and "No space left" in done.err
    assert list((tmp_path / "files").iterdir()) == []
