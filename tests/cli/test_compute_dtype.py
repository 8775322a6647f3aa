"""``--compute-dtype``: what half-precision weights multiply in, measured, or as the user has it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from zoft.bench.memory import Point
from zoft.optim import products
from zoft.train import TrainConfig, arithmetic

from .conftest import Outcome

HALF = ("--dtype", "bfloat16")


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that have been multiplied in float32."""
    shapes, product = [], products.wide_product

    def counted(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return product(x, weight, *rest)

    monkeypatch.setattr(products, "wide_product", counted)
    return shapes


@pytest.fixture
def quicker(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes float32 the quicker one, or not."""
    return lambda yes: monkeypatch.setattr(arithmetic, "float32_is_quicker", lambda dtype: yes)


def settled(out: Path) -> Any:
    return yaml.safe_load((out / "config.yaml").read_text())["compute_dtype"]


@pytest.mark.parametrize("method", ["auto", "agzo"])
def test_the_quicker_one_is_taken_and_written_down(
    method: str,
    train: Callable[..., Outcome],
    zoft: Callable[..., Outcome],
    quicker: Callable[[bool], None],
    wide: list[tuple[int, ...]],
    tmp_path: Path,
) -> None:
    quicker(False)
    assert train("--method", method, *HALF, out=tmp_path / "plain").code == 0
    assert settled(tmp_path / "plain") == "weights" and not wide
    quicker(True)
    assert train("--method", method, *HALF).code == 0
    assert settled(tmp_path / "run") == "float32" and len(set(wide)) > 2
    wide.clear()
    quicker(False)  # on another machine, say: a run is evaluated as it was trained, unless told otherwise
    assert zoft("eval", tmp_path / "run").code == 0
    assert wide
    wide.clear()
    assert zoft("eval", tmp_path / "run", "--compute-dtype", "auto").code == 0
    assert not wide


def test_what_is_asked_for_is_taken(
    train: Callable[..., Outcome], quicker: Callable[[bool], None], wide: list[tuple[int, ...]], tmp_path: Path
) -> None:
    quicker(True)
    assert train(*HALF, "--compute-dtype", "weights").code == 0
    assert settled(tmp_path / "run") == "weights" and not wide
    quicker(False)
    assert train(*HALF, "--compute-dtype", "float32", out=tmp_path / "wide").code == 0
    assert settled(tmp_path / "wide") == "float32" and wide


def test_float32_weights_are_what_they_were(
    train: Callable[..., Outcome], quicker: Callable[[bool], None], wide: list[tuple[int, ...]]
) -> None:
    quicker(True)
    assert train().code == 0
    assert not wide


@pytest.mark.parametrize("method", ["fo-adamw", "lora"])
def test_first_order_methods_leave_autocast_out(
    method: str, train: Callable[..., Outcome], quicker: Callable[[bool], None], tmp_path: Path
) -> None:
    quicker(True)
    assert train("--method", method, *HALF).code == 0
    config = TrainConfig.load(tmp_path / "run" / "config.yaml")
    assert config.compute_dtype == "float32" and not config.autocast
    quicker(False)
    assert train("--method", method, *HALF, out=tmp_path / "plain").code == 0
    assert TrainConfig.load(tmp_path / "plain" / "config.yaml").autocast


def test_the_benches_say_what_they_measured(
    zoft: Callable[..., Outcome], model: Path, quicker: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    quicker(True)
    asked = []

    def measure_apart(self: Point) -> dict[str, Any]:
        asked.append(self.compute_dtype)
        return {"failed": None, "peak_memory_bytes": 1000}

    monkeypatch.setattr(Point, "measure_apart", measure_apart)
    few = ("bench", "step", model, "--repeats", 2, "--batch-size", 2, "--length", 4, "--device", "cpu", *HALF, "--json")
    assert zoft(*few).json()["compute_dtype"] == "float32"
    assert zoft(*few, "--compute-dtype", "weights").json()["compute_dtype"] == "weights"
    assert asked == ["float32"] * 2 + ["weights"] * 2


@pytest.mark.parametrize("command", [("train", "--task", "sst2"), ("bench", "step"), ("bench", "memory")])
def test_another_word_is_a_line(command: tuple[str, ...], zoft: Callable[..., Outcome], model: Path) -> None:
    at = 2 if command[0] == "bench" else 1
    done = zoft(*command[:at], model, *command[at:], "--compute-dtype", "half")
    assert done.code == 2
    assert "compute_dtype must be one of auto, weights, float32, not 'half'" in done.err
