"""The user's own files."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import Outcome

FEW = ("--steps", 2, "--eval-steps", 2, "--batch-size", 8, "--device", "cpu")


def test_prompts_and_completions(
    zoft: Callable[..., Outcome],
    model: Path,
    write: Callable[[Path, list[dict[str, Any]]], Path],
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"what comes after {i}?", "completion": str(i + 1)} for i in range(30)]
    file, out = write(tmp_path / "my.jsonl", rows), tmp_path / "run"
    summary = zoft("train", model, "--data", file, *FEW, "--out", out, "--json").json()
    assert (summary["task"], summary["metric"]) == ("custom", "exact_match")
    assert summary["examples"] == {"train": 16, "dev": 5, "validation": 3}
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert zoft("eval", out, "--json").json()["exact_match"] == summary["best"]


@pytest.mark.parametrize(
    ("row", "through_attention"),
    [
        (lambda i: {"messages": [said("user", f"what comes after {i}?"), said("assistant", str(i + 1))]}, False),
        (lambda i: {"text": f"after {i} comes {i + 1}"}, True),
    ],
    ids=["messages", "text"],
)
def test_what_is_read_and_not_generated(
    row: Callable[[int], dict[str, Any]],
    through_attention: bool,
    zoft: Callable[..., Outcome],
    chat: Path,
    write: Any,
    tmp_path: Path,
) -> None:
    """Guided goes through attention where most tokens are learned."""
    file, out = write(tmp_path / "my.jsonl", [row(i) for i in range(30)]), tmp_path / "run"
    summary = zoft("train", chat, "--data", file, *FEW, "--out", out, "--lr", "1e-2", "--json").json()
    forwards = 4 if through_attention else 2
    assert (summary["metric"], summary["method"], summary["forwards"]) == ("likelihood", "guided", forwards)
    assert yaml.safe_load((out / "config.yaml").read_text())["method_options"]["attention"] is through_attention
    found = zoft("eval", out, "--json").json()
    assert found["likelihood"] == pytest.approx(math.exp(-found["loss"]))
    assert found["likelihood"] == pytest.approx(summary["best"], rel=1e-5) and summary["best"] > summary["initial"]
    shown = json.loads((out / "examples.json").read_text())[0]
    assert shown["after"].startswith("likelihood 0.0") and "27" in shown["prompt"] + shown["answer"]
    report = (out / "report.html").read_text()
    assert "Likelihood on 5 dev examples" in report and "verdict" not in report.partition("</style>")[2]
    assert (out / "adapter" / "chat_template.jinja").is_file()


def test_texts_are_evaluated_in_parts(
    zoft: Callable[..., Outcome], model: Path, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits at all tokens of a whole batch would be the largest thing in memory."""
    file = write(tmp_path / "my.jsonl", [{"text": f"after {i} comes {'much ' * (i % 7)}more"} for i in range(90)])
    whole = zoft("eval", model, "--data", file, "--json").json()
    monkeypatch.setattr("zoft.train.task_trainer.LARGE", 1)
    one_by_one = zoft("eval", model, "--data", file, "--json").json()
    assert whole["examples"] == 9 and one_by_one["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.parametrize("labelled", [False, True])
def test_batches_go_through_attention_in_parts(
    labelled: bool,
    zoft: Callable[..., Outcome],
    model: Path,
    write: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What blocks are called with would take much memory; the steps are the same."""
    file = write(tmp_path / "my.jsonl", [{"text": f"after {i} comes {i + 1}", "label": i % 2} for i in range(30)])
    task = ("--template", "{text} or", "--words", "0=never at all,1=no") if labelled else ()  # words of several tokens
    guided = ("--method", "guided", "--lr", "1e-3", "-o", "attention=true", "--dtype", "float32", "--json")
    settings = ("--data", file, *task, *FEW, *guided)
    whole = zoft("train", model, *settings, "--out", tmp_path / "whole").json()
    for name, value in {"LEAST": 1, "WIDE": 0.25, "SHARE": 1 << 30}.items():
        monkeypatch.setattr(f"zoft.optim.guided.{name}", value)
    parts = zoft("train", model, *settings, "--out", tmp_path / "parts").json()
    assert (whole["forwards"], parts["forwards"]) == (4, 5)  # one more for the bases
    found = [
        {
            name: value
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()[-3:-1]
            for name, value in json.loads(line).items()
            if name.endswith("loss")
        }
        for run in ("whole", "parts")
    ]
    assert found[0].keys() == {"loss", "eval_loss"} and found[1] == pytest.approx(found[0], rel=1e-4)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture
def chat(model: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path / "chat"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return folder


def test_evaluating_takes_no_training_rows(
    zoft: Callable[..., Outcome], model: Path, write: Any, tmp_path: Path
) -> None:
    """Once a folder with nothing but validation rows was refused."""
    write(tmp_path / "validation.jsonl", [{"prompt": f"what comes after {i}?", "completion": str(i)} for i in range(4)])
    assert zoft("eval", model, "--data", tmp_path, "--max-new-tokens", 2, "--json").json()["examples"] == 4
    done = zoft("train", model, "--data", tmp_path, *FEW)
    assert done.code == 2 and "no train.jsonl" in done.err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [said("user", "hello")]}, "my.jsonl:1: the conversation does not end with a message of the assi"),
        ({"text": " "}, "my.jsonl:1: an answer is empty or no text"),
        ({"text": "a", "metric": "f1"}, "metric 'f1' does not fit this task; choose from likelihood"),
    ],
)
def test_mistakes(
    row: dict[str, Any], message: str, zoft: Callable[..., Outcome], chat: Path, write: Any, tmp_path: Path
) -> None:
    metric = ("--metric", row["metric"]) if "metric" in row else ()
    outcome = zoft("train", chat, "--data", write(tmp_path / "my.jsonl", [row] * 9), *FEW, *metric)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err


def test_labelled_table(zoft: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "my.csv", tmp_path / "run"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "score"])
        writer.writerows([f'a "{("dull", "fine")[i % 2]}" film, number {i}', i % 2] for i in range(30))
    task = ("--template", "{text} It was", "--words", "0=bad,1=good", "--label", "score")
    summary = zoft("train", model, "--data", file, *task, *FEW, "--out", out, "--json").json()
    assert (summary["task"], summary["metric"]) == ("custom", "accuracy")
    assert zoft("eval", out, "--json").json()["accuracy"] == summary["best"]


@pytest.mark.parametrize("metric", ["f1", "number_match"])
def test_metric(metric: str, zoft: Callable[..., Outcome], model: Path, write: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl", [{"q": f"{i} plus 1?", "a": [str(i + 1), "one more"]} for i in range(20)])
    task = ("--template", "{q}", "--label", "a", "--metric", metric)
    assert zoft("eval", model, "--data", file, *task, "--json").json()["metric"] == metric
