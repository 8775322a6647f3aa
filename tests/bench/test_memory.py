"""`zoft.bench.memory`: which points are measured, and what is made of them."""

from typing import Any

import pytest

from zoft.bench.memory import Point, compare, with_checkpointing

MIB = 2**20
PEAKS = {"inference": 200, "agzo": 210, "fo-sgd": 500, "fo-sgd+checkpointing": 400}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """The points asked for; instead of a process, `PEAKS`."""
    points: list[Point] = []

    def measure_apart(self: Point) -> dict[str, Any]:
        points.append(self)
        if self.row == "agzo" and self.length == 512:
            return {"failed": "ended by signal 9"}
        peak = PEAKS[self.row] * MIB
        return {"failed": None, "peak_memory_bytes": peak, "above_baseline_bytes": peak - 190 * MIB}

    monkeypatch.setattr(Point, "measure_apart", measure_apart)
    return points


def test_points_and_ratios(played: list[Point]) -> None:
    records = compare("tiny", with_checkpointing(["agzo", "fo-sgd"]), [128, 512], batch_size=2)
    assert [(point.row, point.length) for point in played] == [(row, length) for length in (128, 512) for row in PEAKS]
    assert {point.batch_size for point in played} == {2}
    of = {(record["method"], record["length"]): record for record in records}
    assert of["inference", 128]["ratio"] == of["inference", 128]["ratio_above_baseline"] == 1
    assert of["agzo", 128]["ratio"] == 210 / 200
    assert of["agzo", 128]["ratio_above_baseline"] == 2
    assert of["agzo", 512] == {
        "method": "agzo",
        "length": 512,
        "failed": "ended by signal 9",
        "ratio": None,
        "ratio_above_baseline": None,
    }


def test_inference_that_takes_nothing(played: list[Point], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEAKS, "inference", 190)
    assert [record["ratio_above_baseline"] for record in compare("tiny", ["fo-sgd"], [128])] == [None] * 2
