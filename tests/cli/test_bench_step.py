"""``zoft bench step``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zoft.bench.memory import Point
from zoft.data import positions_to_keep

from .conftest import Outcome

FACTS = {
    "seconds_per_step",
    "seconds_two_forwards",
    "ratio",
    "ratio_own_forwards",
    "forwards_per_step",
    "peak_memory_bytes",
    "inference_peak_memory_bytes",
    "breakdown",
}


@pytest.fixture
def step(zoft: Callable[..., Outcome], model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Times the tiny model; the processes that measure memory are played, and MeZO's is killed."""

    def measure_apart(self: Point) -> dict[str, Any]:
        failed = {"failed": "ended by signal 9"}
        return failed if self.row == "mezo" else {"failed": None, "peak_memory_bytes": 1000 + self.length}

    monkeypatch.setattr(Point, "measure_apart", measure_apart)
    few = ("--repeats", 2, "--batch-size", 4, "--device", "cpu")
    return lambda *args: zoft("bench", "step", model, *few, *args)


def test_one_method(step: Callable[..., Outcome]) -> None:
    found = step("--length", 8, "--json").json()
    assert found.keys() >= FACTS
    assert (found["method"], found["length"], found["batch_size"], found["dtype"]) == ("agzo", 8, 4, "float32")
    assert found["peak_memory_bytes"] == found["inference_peak_memory_bytes"] == 1008
    low, high = found["ratio_quartiles"]
    assert 0 < low <= found["ratio"] == found["ratio_own_forwards"] <= high


def test_texts(step: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """Time and memory are of the same batch: all tokens of it are learned."""
    kept, points = [], []
    monkeypatch.setattr("zoft.bench.step.read_logits", lambda model, batch: kept.append(positions_to_keep(batch)))
    monkeypatch.setattr(Point, "measure_apart", lambda point: points.append(point) or {"failed": None})
    found = step("--length", 8, "--texts", "--json").json()
    assert found["texts"] is True and set(kept) == {8} and [point.texts for point in points] == [True, True]


def test_several_methods(step: Callable[..., Outcome]) -> None:
    methods = ["guided", "guided+attention=true", "mezo-published", "agzo+probes=3+per_example=true", "fo-adamw"]
    found = step("--method", "guided, guided+attention=true", "--method", ",".join(methods[2:]), "--json").json()
    assert list(found["methods"]) == methods and found["length"] == 32
    assert all(facts.keys() >= FACTS for facts in found["methods"].values())
    assert len({facts["seconds_two_forwards"] for facts in found["methods"].values()}) == 1
    assert [facts["forwards_per_step"] for facts in found["methods"].values()] == [1, 2, 2, 4, 1]


def test_an_option_may_be_a_list(step: Callable[..., Outcome]) -> None:
    methods = ["agzo+include=['*.[qk]_proj','*.o_proj']+rank=2", "agzo"]
    found = step("--method", ",".join(methods), "--json").json()
    assert list(found["methods"]) == methods


def test_table(step: Callable[..., Outcome]) -> None:
    outcome = step("--method", "mezo,fo-sgd")
    assert outcome.code == 0 and outcome.err == ""
    for part in ("fo-sgd", "back", "two plain forwards", "failed", "mezo at length 32 failed: ended by signal 9"):
        assert part in outcome.out


def test_rows_of_a_task(step: Callable[..., Outcome], data: Path) -> None:
    found = step("--task", "sst2", "--data", data, "--json").json()
    assert found["task"] == "sst2" and found["length"] > 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method", "agz"], "did you mean agzo?"),
        (["--method", "agzo+rnk=4"], "did you mean rank?"),
        (["--method", "agzo+rank=four"], "rank must be of type int"),
        (["--method", "agzo+rank"], "not of the form name=value"),
        (["--method", "lora"], "zoft bench memory has it"),
        (["--method", "lora+rank=4"], "zoft bench memory has it"),
        (["--method", ","], "',' names no method"),
        (["--length", 300], "the model takes 256 tokens; 300 are too many"),
        (["--task", "sst2", "--length", 8], "--length and --texts are for random tokens"),
        (["--task", "sst2", "--texts"], "--length and --texts are for random tokens"),
        (["--data", "rows"], "--data needs --task"),
    ],
)
def test_mistakes(flags: list[str], message: str, step: Callable[..., Outcome]) -> None:
    outcome = step(*flags)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err, outcome
