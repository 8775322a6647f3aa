"""``zoft train``: what it leaves behind, for every method."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import zoft.train.assemble
from train.tiny import TOKENIZER
from zoft import __version__
from zoft.train.optimizers import FIRST_ORDER

from .conftest import Outcome

LEARNING_RATES = {
    "agzo": 1e-2,
    "zo-act": 1e-2,
    "guided": 1e-2,
    "aim-zo": 1e-2,
    "mezo": 1e-3,
    "lozo": 1e-3,
    "lozo-m": 1e-3,
    "fo-sgd": 1e-2,
    "fo-adamw": 1e-3,
    "lora": 1e-2,
}
SUMMARY = {
    *("task", "model", "method", "seed", "steps", "forwards", "examples_seen", "metric", "initial", "final", "best"),
    *("seconds", "seconds_per_step", "peak_memory_bytes", "zoft_version"),
}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PreTrainedModel]]:
    """The models that training loads, and therefore trains."""
    models: list[PreTrainedModel] = []
    load = zoft.train.assemble.load_model

    def record(*args: Any, **options: Any) -> Any:
        model, tokenizer = load(*args, **options)
        models.append(model)
        return model, tokenizer

    monkeypatch.setattr(zoft.train.assemble, "load_model", record)
    yield models


@torch.no_grad()
def logits(model: Any) -> Tensor:
    batch = TOKENIZER(["a fine film It was", "a dull film It was"], return_tensors="pt")
    return model.eval()(input_ids=batch.input_ids).logits


def load_result(out: Path, base: Path) -> Any:
    if (out / "model").is_dir():
        return AutoModelForCausalLM.from_pretrained(out / "model")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter")


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_run(
    method: str,
    train: Callable[..., Outcome],
    zoft: Callable[..., Outcome],
    loaded: list[PreTrainedModel],
    model: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    outcome = train("--method", method, "--lr", LEARNING_RATES[method])
    assert outcome.code == 0, outcome.err

    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert (summary["method"], summary["steps"], summary["seed"], summary["task"]) == (method, 4, 0, "sst2")
    assert (summary["examples_seen"], summary["zoft_version"]) == (32, __version__)
    assert summary["examples"] == {"train": 24, "dev": 6, "validation": 21}
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["method"], config["lr"], config["steps"]) == (method, LEARNING_RATES[method], 4)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [0, 2, 4]
    assert max(line["forwards"] for line in lines) == summary["forwards"] > 0
    assert "<html" in (out / "report.html").read_text()
    assert {entry.name for entry in out.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "summary.json", "initial.json", "examples.json", "report.html"),
        "adapter" if method in ("zo-act", "guided", "lora") else "model",
        *([] if method in FIRST_ORDER else ["steps.bin"]),
    }

    [trained] = loaded
    torch.testing.assert_close(logits(load_result(out, model)), logits(trained), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(trained), logits(AutoModelForCausalLM.from_pretrained(model)), atol=1e-3)
    assert_evaluates_to(summary, zoft("eval", out, "--json").json(), out)


def assert_evaluates_to(summary: dict[str, Any], found: dict[str, Any], out: Path) -> None:
    """What was kept gives, evaluated on its own, what it gave at the end of training."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [line["validation_loss"] for line in lines if "validation_loss" in line][-1]
    assert found["accuracy"] == summary["best"]
    assert found["loss"] == pytest.approx(last, rel=1e-5)


def test_first_order_in_bfloat16_is_evaluated_as_it_was_trained(
    train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    summary = train("--method", "fo-sgd", "--dtype", "bfloat16", "--json").json()
    assert_evaluates_to(summary, zoft("eval", tmp_path / "run", "--json").json(), tmp_path / "run")


def test_best_of_the_checkpoints_is_kept(train: Callable[..., Outcome], tmp_path: Path) -> None:
    """The best evaluation may lie between two checkpoints: where nothing changes, the first is the best."""
    out = tmp_path / "run"
    summary = train("--lr", 0, "--save-steps", 4, "--json", steps=8).json()
    assert summary["best_step"] == 2
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-8"]


def test_training_that_diverges_still_ends_in_a_report(train: Callable[..., Outcome], tmp_path: Path) -> None:
    summary = train("--method", "agzo", "--lr", 1e30, "--json").json()
    assert summary["skipped"] > 0
    for file in ("metrics.jsonl", "summary.json", "initial.json"):
        text = (tmp_path / "run" / file).read_text()
        assert "NaN" not in text and "Infinity" not in text


def test_a_loss_that_is_no_number_is_null_in_json(zoft: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    """Once summary.json held NaN and -Infinity, which other readers of JSON refuse."""
    rows = "".join(json.dumps({"text": f"after {i} comes {i + 1}"}) + "\n" for i in range(30))
    (tmp_path / "my.jsonl").write_text(rows)
    few = ("--steps", 2, "--eval-steps", 2, "--batch-size", 8, "--device", "cpu", "--out", tmp_path / "run")
    done = zoft("train", model, "--data", tmp_path / "my.jsonl", "--method", "mezo", "--lr", 1e8, *few)
    assert done.code == 0, done.err
    text = (tmp_path / "run" / "summary.json").read_text()
    assert json.loads(text)["best_dev"] is None and "NaN" not in text and "Infinity" not in text
    assert zoft("report", tmp_path / "run").code == 0


def test_the_last_batch_of_an_epoch_is_smaller(train: Callable[..., Outcome]) -> None:
    """Once every step counted as a whole batch."""
    summary = train("--method", "agzo", "--train-examples", 9, "--json", steps=3).json()
    assert summary["examples_seen"] == 8 + 1 + 8


def test_an_answer_that_is_accepted_is_right(
    zoft: Callable[..., Outcome], model: Path, write: Any, tmp_path: Path
) -> None:
    """Once it was compared with the first of the accepted answers alone."""
    [said] = examples_of(zoft, model, write(tmp_path / "one.jsonl", rows_of(["zzz"])), tmp_path / "one")
    assert said["right"] == {"before": False, "after": False}
    [said] = examples_of(zoft, model, write(tmp_path / "two.jsonl", rows_of(["zzz", said["before"]])), tmp_path / "two")
    assert said["right"] == {"before": True, "after": True}


def rows_of(answers: list[str]) -> list[dict[str, Any]]:
    return [{"prompt": "what comes after 7?", "completion": answers}] * 10


def examples_of(zoft: Callable[..., Outcome], model: Path, data: Path, out: Path) -> Any:
    few = ("--steps", 1, "--batch-size", 2, "--method", "mezo", "--lr", 0, "--max-new-tokens", 3, "--device", "cpu")
    assert zoft("train", model, "--data", data, *few, "--out", out).code == 0
    return json.loads((out / "examples.json").read_text())


def test_constant_schedule_warms_up(train: Callable[..., Outcome], tmp_path: Path) -> None:
    assert train("--warmup-steps", 8, "--lr", 0.008).code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [rate] = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rate == pytest.approx(0.003)  # of the fourth step, the first having had 0


def test_polynomial_schedule_of_a_small_rate(train: Callable[..., Outcome], tmp_path: Path) -> None:
    """Once a traceback: transformers ends it at 1e-7."""
    assert train("--method", "mezo", "--lr", 1e-7, "--schedule", "polynomial").code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "learning_rate" in line] == [pytest.approx(1e-7 / 4)]


def test_folders_are_said_as_they_are_called(train: Callable[..., Outcome], tmp_path: Path) -> None:
    """Once brackets were read as markup, and lines to a pipe broken after 80 characters."""
    out = tmp_path / f"[b]mine {'x' * 80}"
    lines = train("--method", "mezo", out=out, steps=2).out.splitlines()
    assert f"report: {out / 'report.html'}" in lines and f"model: {out / 'model'}" in lines


def test_keeping_an_earlier_checkpoint_does_not_forget_what_the_run_cost(train: Callable[..., Outcome]) -> None:
    """Coefficients come back with their optimizer's state, and with it the counters of that moment."""
    summary = train("--method", "zo-act", "--lr", 10.0, "--json", steps=8).json()
    assert summary["best_step"] < 8
    assert summary["forwards"] == 16


def test_training_for_nothing_is_said(train: Callable[..., Outcome], tmp_path: Path) -> None:
    done = train("--method", "agzo", "--lr", "0")
    assert done.code == 0 and "nothing was better than before training" in " ".join(done.out.split())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["initial_dev"] == summary["best_dev"]
