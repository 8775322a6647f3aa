"""``zoft bench memory``: the command line, and the processes that it starts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

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


def test_texts(memory: Callable[..., Outcome]) -> None:
    """Logits at all tokens take more than at the last alone."""
    flags = ("--methods", "guided", "--lengths", "256", "--batch-size", "64", "--json")
    labels, texts = (memory(*flags, *more).json()["points"] for more in ((), ("--texts",)))
    assert all(more["peak_memory_bytes"] > less["peak_memory_bytes"] for more, less in zip(texts, labels, strict=True))


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
    (tmp_path / "zoft" / "__main__.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = memory("--methods", "agzo", "--lengths", "8,16")
    assert outcome.code == 0
    assert outcome.out.count("failed: ended by signal 9, for lack of memory?") == 4


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
def test_mistakes(flags: list[str], message: str, memory: Callable[..., Outcome]) -> None:
    outcome = memory(*flags)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err, outcome
