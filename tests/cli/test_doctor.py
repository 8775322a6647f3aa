"""``zoft doctor``."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zoft.cli.doctor import _advice
from zoft.train.diagnosis import Diagnosis

from .conftest import Outcome


@pytest.fixture
def doctor(zoft: Callable[..., Outcome], model: Path, data: Path) -> Callable[..., Outcome]:
    """Examines the tiny model with a few directions."""
    few = ("--directions", 2, "--batch-size", 4, "--dtype", "float32", "--device", "cpu")
    return lambda *args: zoft("doctor", model, "--task", "sst2", "--data", data, *few, *args)


def test_advice_in_words(doctor: Callable[..., Outcome]) -> None:
    outcome = doctor("--steps", 50)
    assert outcome.code == 0
    for part in ("error, one-sided", "--eps", "lr", "50 steps of agzo"):
        assert part in outcome.out


@pytest.mark.parametrize("method", ["agzo", "zo-act", "lozo", "mezo"])
def test_figures(doctor: Callable[..., Outcome], method: str) -> None:
    found = doctor("--method", method, "--json").json()
    assert found["eps"] in found["distances"] and len(found["distances"]) == len(found["errors"]["one-sided"])
    assert found["forwards"] == 2 * 2 * 15 and found["slope"] > 0
    assert found["seconds_per_forward"] > 0 and found["peak_memory_bytes"] > 0


def test_gradient_energy_and_plot(doctor: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = doctor("--gradient", "--plot", tmp_path / "eps.png")
    assert outcome.code == 0 and "at rank 16" in outcome.out
    assert (tmp_path / "eps.png").stat().st_size > 1000
    energy = doctor("--gradient", "--json").json()["captured_energy"]
    assert [*energy] == ["1", "2", "4", "8", "16"]
    assert 0 < energy["1"] < energy["4"] < energy["16"] <= 1.001


@pytest.mark.parametrize("agreement, harm", [(0.5, "above 1e-02 the first step does harm"), (-0.5, None)])
def test_no_rate_below_zero_is_spoken_of(agreement: float, harm: str | None) -> None:
    sides: dict[str, list[float]] = {"one-sided": [0.1], "two-sided": [0.1]}
    found = Diagnosis(1e-3, 2e-4, agreement / 50, 1.0, 100.0, agreement, [1e-3], sides, False, 60)
    said = " ".join(_advice(found, {"seconds": 1.0, "peak_memory_bytes": 1}, "agzo", 300))
    assert "--lr 2e-04" in said and "above -" not in said
    assert "does harm" not in said if harm is None else harm in said


def test_the_forecast_is_of_the_methods_own_probes(doctor: Callable[..., Outcome]) -> None:
    """Once every step was taken for two forwards."""
    for probes, forwards in ((1, 2), (8, 9)):
        found = doctor("--method", "zo-act", "-o", f"probes={probes}", "--steps", 10**6, "--json").json()
        assert found["seconds"] == pytest.approx(forwards * 10**6 * found["seconds_per_forward"], rel=0.3)


def test_options_reach_the_method(doctor: Callable[..., Outcome]) -> None:
    one, four = (doctor("-o", f"rank={rank}", "--json").json()["curvature"] for rank in (1, 4))
    assert one != four


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--method", "fo-adamw"), "first-order"),
        (("--method", "guided"), "no eps"),
        (("--method", "agz"), "agzo"),
        (("--method", "auto"), "name the method"),
        (("--plot", "plot.xyz"), "plot.xyz"),
        (("--batch-size", 16), "two batches of 16 need 32 rows; there are 30"),
    ],
)
def test_mistakes_are_one_line(doctor: Callable[..., Outcome], arguments: tuple[str, ...], message: str) -> None:
    outcome = doctor(*arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert message in outcome.err
