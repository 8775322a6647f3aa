"""``zoft train`` on a run that left an adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import DeepseekV3Config, FalconH1Config, MambaConfig, PreTrainedConfig

from optim.models import GROUPED, SIZES, build
from train.tiny import TOKENIZER
from zoft.train import load_model

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


OWN = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256}
KINDS: dict[str, tuple[PreTrainedConfig, str]] = {
    "mamba": (MambaConfig(**SIZES | OWN, state_size=8), "zo-act"),
    "falcon-h1": (
        FalconH1Config(**GROUPED | OWN, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
        "guided",
    ),
    "deepseek": (
        DeepseekV3Config(
            **GROUPED | OWN | {"num_key_value_heads": 4}, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
            moe_intermediate_size=24, first_k_dense_replace=1,
        ),
        "guided",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_auto_trains_loads_again(kind: str, zoft: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    """Of models whose layers PEFT refuses, or takes for experts by their names."""
    config, method = KINDS[kind]
    build(config).save_pretrained(tmp_path / kind)
    TOKENIZER.save_pretrained(tmp_path / kind)
    out = tmp_path / "run"
    done = zoft(
        "train", tmp_path / kind, "--task", "sst2", "--data", data, "--steps", 4, "--eval-steps", 2, "--lr", "0.1",
        "--batch-size", 8, "--device", "cpu", "--dtype", "float32", "--out", out, "--json",
    )  # fmt: skip
    summary = done.json()
    assert summary["method"] == method
    found = zoft("eval", out, "--json").json()
    logged = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses = [line["validation_loss"] for line in logged if "validation_loss" in line]
    assert found["accuracy"] == summary["best"] and pytest.approx(found["loss"], rel=1e-4) in losses


def test_lora_adds_no_second_one(adapter: Path, zoft: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    done = zoft("train", adapter, "--method", "lora", "--task", "sst2", "--data", data, "--out", tmp_path / "second")
    assert done.code == 2
    assert "the model is an adapter already: fo-adamw trains it" in done.err


def test_what_is_measured_of_it_is_measured_of_what_it_makes(
    adapter: Path, zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path
) -> None:
    """By ``zoft align`` and ``zoft doctor``, in the weights that it is merged into as beside them."""
    assert zoft("export", adapter, "--to", "merged", "--out", tmp_path / "merged").code == 0
    rows = ["--task", "sst2", "--data", data, "--batch-size", 4, "--dtype", "float32", "--device", "cpu", "--json"]
    cosines, energies, slopes = [], [], []
    for place in (adapter, tmp_path / "merged", model):
        found = zoft("align", place, *rows, "--methods", "agzo,guided", "--estimates", 3).json()["methods"]
        cosines.append([found[method]["cosine_mean"] for method in found])
        found = zoft("doctor", place, *rows, "--method", "zo-act", "--directions", 2, "--gradient").json()
        energies.append([*found["captured_energy"].values()])
        slopes.append(found["slope"])
    for figures in (cosines, energies):
        assert figures[0] == pytest.approx(figures[1], rel=1e-3) != pytest.approx(figures[2], rel=1e-3)
    assert slopes[0] != pytest.approx(slopes[2], rel=1e-3)


def test_other_methods_are_measured_on_its_own_parameters(
    adapter: Path, zoft: Callable[..., Outcome], data: Path
) -> None:
    rows = ["--task", "sst2", "--data", data, "--batch-size", 4, "--directions", 2, "--json"]
    for method in ("agzo", "mezo"):
        assert zoft("doctor", adapter, *rows, "--method", method).json()["slope"] > 0


@pytest.mark.usefixtures("forked")
def test_its_cost_is_that_of_the_model_it_adds_to(adapter: Path, zoft: Callable[..., Outcome]) -> None:
    few = ["--methods", "lora", "--lengths", 16, "--device", "cpu", "--json"]
    points = zoft("bench", "memory", adapter, *few).json()["points"]
    assert [point["failed"] for point in points] == [None] * 3
    few = ["--method", "agzo", "--batch-size", 1, "--length", 8, "--repeats", 2, "--device", "cpu", "--json"]
    assert zoft("bench", "step", adapter, *few).json()["seconds_per_step"] > 0


TOKENS = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}


def write_tokens(config: PeftConfig, model: Path, folder: Path) -> Path:
    """An adapter of virtual tokens."""
    base: Any = load_model(str(model))[0]
    get_peft_model(base, config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_trained_on(
    kind: type[PeftConfig], zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path
) -> None:
    tokens, run = write_tokens(kind(**TOKENS), model, tmp_path / "tokens"), tmp_path / "run"
    rows = ["--task", "sst2", "--data", data, "--device", "cpu", "--json"]
    short = ["--steps", 4, "--eval-steps", 2, "--batch-size", 8, "--lr", "0.1", "--eps", "0.01", "--out", run]
    summary = zoft("train", tokens, *rows, *short, "--method", "mezo").json()
    assert summary["initial"] == zoft("eval", tokens, *rows).json()["accuracy"]
    assert summary["best"] == zoft("eval", run, "--json").json()["accuracy"]
    old, new = (
        load_file(place / "adapter_model.safetensors")["prompt_embeddings"] for place in (tokens, run / "adapter")
    )
    assert old.shape == new.shape and bool((old != new).all())


@pytest.mark.usefixtures("forked")
def test_virtual_tokens_have_their_cost_measured(zoft: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    tokens = write_tokens(PrefixTuningConfig(**TOKENS), model, tmp_path / "tokens")
    assert zoft("bench", "memory", tokens, "--methods", "agzo", "--lengths", 8, "--device", "cpu").code == 0


def test_tokens_that_a_network_has_made_are_not(
    zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path
) -> None:
    config = PrefixTuningConfig(**TOKENS, prefix_projection=True, encoder_hidden_size=8)
    tokens = write_tokens(config, model, tmp_path / "tokens")
    done = zoft("train", tokens, "--task", "sst2", "--data", data, "--method", "mezo", "--out", tmp_path / "run")
    assert done.code == 2 and "is not saved with them: it cannot be trained" in done.err
    assert zoft("eval", tokens, "--task", "sst2", "--data", data).code == 0
