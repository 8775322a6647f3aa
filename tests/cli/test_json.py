"""``--json``: one JSON object on standard output and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Outcome


def test_train(train: Callable[..., Outcome]) -> None:
    outcome = train("--method", "agzo", "--json")
    assert outcome.json()["method"] == "agzo"
    assert outcome.err == ""


def test_eval(zoft: Callable[..., Outcome], model: Path, data: Path) -> None:
    found = zoft("eval", model, "--task", "sst2", "--data", data, "--shots", 2, "--json").json()
    assert found["examples"] == 21 and 0 <= found["accuracy"] <= 1 and found["loss"] > 0


def test_align(zoft: Callable[..., Outcome], model: Path, data: Path) -> None:
    few = ("--estimates", 4, "--batches", 2, "--batch-size", 4)
    found = zoft("align", model, "--task", "sst2", "--data", data, "--methods", "agzo,mezo", *few, "--json").json()
    assert found["methods"].keys() == {"agzo", "mezo"}
    for facts in found["methods"].values():
        assert {"cosine_mean", "cosine_sem", "predicted_cosine", "capture", "forwards"} <= facts.keys()
        assert facts["estimates"] == 4 and facts["forwards"] == 8
    assert found["methods"]["mezo"]["capture"] == 1


def test_tasks(zoft: Callable[..., Outcome]) -> None:
    assert zoft("tasks", "--json").json()["sst2"]["kind"] == "classification"


def test_methods(zoft: Callable[..., Outcome]) -> None:
    found = zoft("methods", "--json").json()
    assert found.keys() == {"mezo", "lozo", "lozo-m", "agzo", "zo-act", "aim-zo", "guided"}
    assert found["agzo"]["lr"] > 0


def test_methods_in_80_columns(zoft: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once cells were cut."""
    monkeypatch.setenv("COLUMNS", "80")
    said = zoft("methods").out
    assert "…" not in said and "leave-one-out" in said and "coefficients" in said
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 80
