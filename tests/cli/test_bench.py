"""``zoft bench accuracy``: the command line, and the processes that it starts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from zoft.train.callbacks import Clock, RunLog

from .conftest import Outcome

SUITE = {
    "tasks": ["sst2"],
    "methods": {"agzo": {"lr": 1e-2}},
    "budget": {"forwards": 8},
    "batch_size": 8,
    "evaluations": 2,
    "dtype": "float32",
    "device": "cpu",
    "search": False,
}


@pytest.fixture
def root(data: Path, tmp_path: Path) -> Path:
    """A folder with a folder of rows for each task."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sst2").symlink_to(data, target_is_directory=True)
    return tmp_path / "data"


@pytest.fixture
def suite(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "films.yaml"
    path.write_text(yaml.safe_dump({"model": str(model)} | SUITE))
    return path


@pytest.mark.usefixtures("forked")
def test_runs_tables_and_curves(suite: Path, root: Path, zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    out = tmp_path / "results" / "films"
    found = zoft("bench", "accuracy", suite, "--data", root, "--json").json()
    assert {path.name for path in out.iterdir()} == {"sst2", "table.md", "curves.png"}
    run = json.loads((out / "sst2" / "agzo" / "lr1e-2-s0.json").read_text())
    assert (run["steps"], run["forwards"], run["method"], run["failed"]) == (4, 8, "agzo", None)
    assert [point["forwards"] for point in run["curve"]] == [0, 4, 8]
    untrained = json.loads((out / "sst2" / "zero-shot" / "s0.json").read_text())
    assert untrained["best"] == untrained["accuracy"] == run["initial"]
    assert untrained["peak_memory_bytes"] > 2**20
    assert found["methods"]["agzo"]["tasks"]["sst2"]["mean"] == run["best"]
    assert found["methods"]["zero-shot"]["mean"] == untrained["best"]

    for name in ("table.md", "curves.png"):
        (out / name).unlink()
    report = zoft("bench", "accuracy", suite, "--report-only", "--markdown")
    assert report.out == (out / "table.md").read_text()
    assert f"| agzo | {100 * run['best']:.1f} | " in report.out
    assert (out / "curves.png").is_file()
    plain = zoft("bench", "accuracy", suite, "--report-only", "--out", tmp_path / "empty")
    assert plain.code == 0 and "zero-shot" in plain.out and not list((tmp_path / "empty").glob("sst2"))


def test_failed_run(suite: Path, root: Path, zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    """A process that ends with an error is a result, and the next run is made."""
    sick = tmp_path / "sick"
    sick.mkdir()
    (sick / "zoft").mkdir()
    (sick / "zoft" / "__init__.py").touch()
    (sick / "zoft" / "__main__.py").write_text("raise MemoryError('no room for it')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(sick))
        outcome = zoft("bench", "accuracy", suite, "--data", root)
    assert outcome.code == 0
    assert outcome.out.count("failed: MemoryError: no room for it") == 2
    assert "1 of about 2: sst2/zero-shot/s0" in outcome.out and "2 of about 2: sst2/agzo/lr1e-2-s0" in outcome.out
    assert "(1 of 1 failed)" in outcome.out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only", "sst2"], "--only sst2: the suite has no TASK/METHOD like it"),
        (["--data", "no/such"], "--data no/such: no such folder"),
    ],
)
def test_flags(flags: list[str], message: str, suite: Path, zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = zoft("bench", "accuracy", suite, *flags)
    assert (outcome.code, outcome.err) == (2, f"zoft: {message}\n")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot read config file"),
        ("- sst2", "no settings of the form name: value"),
        ("model: demo\ntask: sst2", "unknown setting 'task'; did you mean tasks?"),
        (
            "model: demo\ntasks: sst2\nbudget: {steps: 9}\nmethods: {agz: {}}",
            "method agz: unknown method 'agz'; did you mean agzo?",
        ),
    ],
)
def test_suite(text: str | None, message: str, zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    if text is not None:
        path.write_text(text)
    outcome = zoft("bench", "accuracy", path)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err, outcome


@pytest.mark.usefixtures("forked")
def test_missing_rows_end_the_suite(suite: Path, zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = zoft("bench", "accuracy", suite, "--data", tmp_path / "empty")
    assert outcome.code == 2
    assert outcome.err == f"zoft: sst2/zero-shot/s0: {tmp_path / 'empty' / 'sst2'}: no such file or folder\n"
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]


@pytest.mark.parametrize("method", ["agzo", "fo-sgd"])
def test_training_ends_when_its_seconds_are_up(method: str, train: Callable[..., Outcome], tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("seconds: 0.1\n")
    summary = train("--config", settings, "--method", method, "--eval-steps", 10**6, "--json", steps=10**6).json()
    assert summary["best_step"] == summary["steps"] < 10**6
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [0, summary["steps"]]
    assert summary["seconds"] >= 0.1


@pytest.mark.parametrize(
    "limit, interval, evaluated, ended",
    [(1.0, 0.4, [0.5, 0.9, 1.0, 1.1], [1.0, 1.1]), (None, 0.4, [0.5, 0.9], []), (1.0, None, [1.0, 1.1], [1.0, 1.1])],
)
def test_clock(
    limit: float | None, interval: float | None, evaluated: list[float], ended: list[float], tmp_path: Path
) -> None:
    log = RunLog(tmp_path / "metrics.jsonl", lambda step: 2 * step, torch.device("cpu"))
    clock, facts = Clock(log, limit, interval), (TrainingArguments(str(tmp_path)), TrainerState())
    controls = {}
    for log.seconds in (0.2, 0.3, 0.5, 0.7, 0.9, 1.0, 1.1):
        clock.on_step_end(*facts, controls.setdefault(log.seconds, TrainerControl()))
    assert [seconds for seconds, control in controls.items() if control.should_evaluate] == evaluated
    assert [seconds for seconds, control in controls.items() if control.should_training_stop] == ended


@pytest.mark.parametrize(
    "settings, message",
    [
        ("seconds: 0", "seconds must be a number above 0, not 0.0"),
        ("eval_seconds: -1", "eval_seconds must be a number above 0"),
        ("seconds: 5\nschedule: linear", "a linear schedule needs the number of steps"),
    ],
)
def test_seconds_that_make_no_sense(settings: str, message: str, train: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(settings)
    outcome = train("--config", tmp_path / "settings.yaml")
    assert outcome.code == 2 and message in outcome.err


def test_first_order_on_some_of_the_parameters(train: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    flags = ("--method", "fo-adamw", "--lr", "1e-2", "-o")
    assert train(*flags, "include=model.layers.1.*").code == 0
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "run" / "model" / "model.safetensors")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {name for name in before if name.startswith("model.layers.1.")}
    outcome = train(*flags, "include=no.such", out=tmp_path / "other")
    assert outcome.code == 2 and "no parameter is named like no.such" in outcome.err
