"""What a run leaves to zoft: the method, lr and eps."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaModel, MiniMaxConfig, MiniMaxForCausalLM

import zoft.train.auto as zoft_auto
from train.tiny import TOKENIZER, make_model
from zoft.train import TrainConfig, task_closures

from .conftest import Outcome

FEW = ("--steps", 4, "--eval-steps", 2, "--batch-size", 8, "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="session")
def no_stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model whose blocks multiply the residual stream by a number, which breaks it."""
    folder = tmp_path_factory.mktemp("models") / "no-stream"
    config = MiniMaxConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        full_attn_alpha_factor=2.0,
        linear_attn_alpha_factor=2.0,
        mlp_alpha_factor=2.0,
        max_position_embeddings=256,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    MiniMaxForCausalLM(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def settled(out: Path) -> TrainConfig:
    return TrainConfig(**yaml.safe_load((out / "config.yaml").read_text()))


def test_a_residual_stream_is_guided(train: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = train()
    assert outcome.code == 0, outcome.err
    config = settled(tmp_path / "run")
    assert (config.method, config.schedule, config.eps) == ("guided", "linear", None)
    assert "method guided, lr" in outcome.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["forwards"], summary["forwards_before"]) == (8, 0)  # through attention
    assert config.method_options["attention"] and config.method_options["train_bases"]


def test_what_is_measured_is_as_long_as_what_is_learned(
    train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once --max-length did not shorten the batches that lr is measured on, nor what they take of memory."""
    widths: list[int] = []

    def look(model: Any, batches: list[Any]) -> Any:
        widths.extend(batch["input_ids"].shape[1] for batch in batches)
        return task_closures(model, batches)

    monkeypatch.setattr("zoft.train.assemble.task_closures", look)
    assert train("--max-length", 12).code == 0
    assert widths and max(widths) < 12  # and the label word


def test_guided_has_its_rate_from_the_model(
    train: Callable[..., Outcome], zoft: Callable[..., Outcome], data: Path, tmp_path: Path
) -> None:
    """The same for auto and for its name; larger where a step of the same size is less: of fewer coefficients, or
    in layers that give more."""
    assert train().code == 0
    by_name = ("--method", "guided", "--lr", "auto", "-o", "attention=true", "-o", "train_bases=true")
    assert train(*by_name, out=tmp_path / "named").code == 0
    assert train(*by_name, "-o", "rank=1", out=tmp_path / "narrow").code == 0
    assert train("--lr", "2e-3", out=tmp_path / "given").code == 0
    louder = make_model()
    for name, weight in louder.named_parameters():
        if "_proj" in name:
            weight.data *= 4
    louder.save_pretrained(tmp_path / "louder")
    TOKENIZER.save_pretrained(tmp_path / "louder")
    command = ("train", tmp_path / "louder", "--task", "sst2", "--data", data, *FEW)
    assert zoft(*command, "--out", tmp_path / "of louder").code == 0
    usual, named, given = (settled(tmp_path / name).lr for name in ("run", "named", "given"))
    narrow, louder_ones = (settled(tmp_path / name).lr for name in ("narrow", "of louder"))
    assert usual == named and given == 2e-3
    assert narrow > usual and louder_ones >= 3 * usual


@pytest.mark.parametrize("measured, expected", [(0.0123456, 0.012), (None, 1e-3)])
def test_without_a_stream_probes_with_measured_steps(
    measured: float | None,
    expected: float,
    zoft: Callable[..., Outcome],
    no_stream: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """An lr that cannot be measured is the method's own."""
    diagnose = zoft_auto.diagnose
    monkeypatch.setattr(zoft_auto, "diagnose", lambda *a: replace(diagnose(*a, directions=2), lr=measured))
    outcome = zoft("train", no_stream, "--task", "sst2", "--data", data, *FEW, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    config = settled(tmp_path / "run")
    found = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert (config.method, config.schedule) == ("zo-act", "constant")
    assert (config.lr, config.eps) == (expected, found["eps"])
    assert ("does not curve upwards" in outcome.out) == (measured is None)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["forwards_before"] == found["forwards"] == 60


def test_what_is_given_is_not_measured(
    zoft: Callable[..., Outcome], no_stream: Path, data: Path, tmp_path: Path
) -> None:
    given = ("--lr", "2e-3", "--eps", "1e-2")
    assert zoft("train", no_stream, "--task", "sst2", "--data", data, *FEW, *given, "--out", tmp_path / "run").code == 0
    config = settled(tmp_path / "run")
    assert (config.lr, config.eps) == (2e-3, 1e-2)
    assert not (tmp_path / "run" / "diagnosis.json").exists()


@pytest.mark.parametrize("method", ["agzo", "mezo"])
def test_measured_lr_is_the_doctors(
    method: str, train: Callable[..., Outcome], zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path
) -> None:
    """The doctor looks at batches of its own choice: the same but for their noise."""
    assert train("--method", method, "--lr", "auto").code == 0
    same = ("--batch-size", 8, "--dtype", "float32", "--device", "cpu")
    found = zoft("doctor", model, "--task", "sst2", "--data", data, "--method", method, *same, "--json").json()
    assert settled(tmp_path / "run").lr == pytest.approx(found["lr"], rel=1.0)
    assert settled(tmp_path / "run").eps == TrainConfig(model="m", task="sst2", method=method).eps


def test_a_broken_model_ends_in_words(zoft: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    """Once a traceback: weights that are not finite."""
    broken = make_model()
    broken.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    TOKENIZER.save_pretrained(tmp_path / "broken")
    many = ("--steps", 12, "--eval-steps", 12, "--batch-size", 2, "--dtype", "float32", "--device", "cpu")
    outcome = zoft("train", tmp_path / "broken", "--task", "sst2", "--data", data, *many, "--out", tmp_path / "run")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "no estimate so far had a finite loss" in outcome.err


@pytest.mark.parametrize("faster", [False, True])
def test_probe_batching_is_what_is_faster(
    train: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    """By a clock on which a run of the model takes a second, and one on copies of the batch one more or less."""
    now = [0.0]
    rows: list[int] = []

    def forward(self: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        copies = kwargs["input_ids"].shape[0] > 8
        rows.append(kwargs["input_ids"].shape[0])
        now[0] += (1.5 if faster else 2.5) if copies else 1.0
        return run(self, *args, **kwargs)

    run = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", forward)
    monkeypatch.setattr(zoft_auto.time, "perf_counter", lambda: now[0])
    outcome = train("--method", "agzo", "--option", "probe_batching=auto")
    assert outcome.code == 0, outcome.err
    assert settled(tmp_path / "run").method_options["probe_batching"] is faster
    assert rows.count(16) == zoft_auto.ROUNDS + (4 if faster else 0)  # two copies of the batch


def test_probe_batching_that_cannot_be_ends_in_words(train: Callable[..., Outcome]) -> None:
    outcome = train("--method", "mezo", "--option", "probe_batching=true")
    assert outcome.code == 2
    assert "option probe_batching: " in outcome.err and "low-rank" in outcome.err


def test_probe_batching_that_cannot_be_is_not_chosen(train: Callable[..., Outcome], tmp_path: Path) -> None:
    assert train("--method", "mezo", "--option", "probe_batching=auto").code == 0
    assert settled(tmp_path / "run").method_options["probe_batching"] is False


def test_only_train_settles_probe_batching(zoft: Callable[..., Outcome], model: Path, data: Path) -> None:
    given = ("--data", data, "--batch-size", 4, "--methods", "agzo", "-o", "probe_batching=auto")
    outcome = zoft("align", model, "--task", "sst2", *given)
    assert outcome.code == 2
    assert "probe_batching must be True or False" in outcome.err


def test_another_objective_is_not_measured_by_probes(
    zoft: Callable[..., Outcome], no_stream: Path, data: Path, tmp_path: Path
) -> None:
    """Without a stream probes are left, and their lr and eps cannot be measured by what moves in steps."""
    flags = ("--task", "sst2", "--data", data, "--objective", "accuracy", *FEW, "--out", tmp_path / "run")
    outcome = zoft("train", no_stream, *flags)
    assert outcome.code == 2 and "guided finds no residual stream here: choose a method with probes" in outcome.err
    assert zoft("train", no_stream, *flags, "--method", "zo-act", "--lr", "1e-3", "--eps", "0.1").code == 0
