"""``zoft bench memory``: the command line, and the processes that it starts."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from forks import ended

from .conftest import Outcome


@pytest.fixture
def memory(zoft: Callable[..., Outcome], model: Path) -> Callable[..., Outcome]:
    return lambda *args: zoft("bench", "memory", model, "--device", "cpu", *args)


def test_points_and_plot(memory: Callable[..., Outcome], tmp_path: Path) -> None:
    plot = tmp_path / "memory.png"
    found = memory("--methods", "agzo", "--lengths", "8", "--plot", plot, "--json").json()
    assert [(point["method"], point["length"]) for point in found["points"]] == [("inference", 8), ("agzo", 8)]
    assert all(point["failed"] is None and point["ratio"] > 0 for point in found["points"])
    assert plot.stat().st_size > 1000 and found["texts"] is False


def test_texts(model: Path) -> None:
    """Logits at all tokens take more than at the last alone."""
    point = {"model": str(model), "row": "inference", "dtype": "auto", "device": "cpu", "length": 256, "batch_size": 64}

    def peak(texts: bool) -> int:
        command = [sys.executable, "-m", "zoft", "bench", "memory-point", json.dumps(point | {"texts": texts})]
        return json.loads(ended(command, {}).stdout)["peak_memory_bytes"]

    assert peak(texts=True) > peak(texts=False)


@pytest.mark.parametrize(
    "row, dtype",
    [
        ("guided", "bfloat16"),
        ("mezo-published", "bfloat16"),
        ("fo-adamw", "float32"),
        ("lora+checkpointing", "bfloat16"),
    ],
)
@pytest.mark.parametrize("texts", [False, True])
def test_one_point(row: str, dtype: str, texts: bool, zoft: Callable[..., Outcome], model: Path) -> None:
    sizes = {"length": 8, "batch_size": 2, "texts": texts}
    point = {"model": str(model), "row": row, "dtype": "bfloat16", "device": "cpu"} | sizes
    found = zoft("bench", "memory-point", json.dumps(point)).json()
    assert found["weights_dtype"] == dtype
    assert found["peak_memory_bytes"] >= found["baseline_memory_bytes"] > 0
    assert found["above_baseline_bytes"] == found["peak_memory_bytes"] - found["baseline_memory_bytes"]


def test_table_and_failures(memory: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoft").mkdir()
    (tmp_path / "zoft" / "__init__.py").touch()
    points = tmp_path / "points"
    (tmp_path / "zoft" / "__main__.py").write_text(
        f"import os, sys; print(sys.argv[-1], file=open({str(points)!r}, 'a'), flush=True); os.kill(os.getpid(), 9)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = memory("--methods", "agzo", "--lengths", "8,16", "--texts")
    assert outcome.code == 0
    assert outcome.out.count("failed: ended by signal 9, for lack of memory?") == 4
    asked = [json.loads(line) for line in points.read_text().splitlines()]
    assert [(point["row"], point["length"]) for point in asked] == [
        ("inference", 8), ("agzo", 8), ("inference", 16), ("agzo", 16)
    ]  # fmt: skip
    assert all(point["texts"] for point in asked)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--methods", "agz"], "did you mean agzo?"),
        (["--lengths", "8,x"], "--lengths takes whole numbers above 0, separated by commas, not 'x'"),
        (["--lengths", ","], "--lengths names no length"),
        (["--plot", "plot.xyz"], "cannot save a plot as plot.xyz"),
        (["--lengths", "300"], "inference at length 300: the model takes 256 tokens; 300 are too many"),
    ],
)
@pytest.mark.usefixtures("forked")
def test_mistakes(flags: list[str], message: str, memory: Callable[..., Outcome]) -> None:
    outcome = memory(*flags)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err, outcome
