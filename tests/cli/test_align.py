"""``zoft align``."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Outcome


@pytest.fixture
def align(zoft: Callable[..., Outcome], model: Path, data: Path) -> Callable[..., Outcome]:
    """Compares two methods on the tiny model with a few estimates."""
    few = ("--methods", "agzo, mezo", "--estimates", 6, "--batches", 2, "--batch-size", 4)
    return lambda *args: zoft("align", model, "--task", "sst2", "--data", data, *few, *args)


def test_table(align: Callable[..., Outcome]) -> None:
    outcome = align()
    assert outcome.code == 0
    assert "agzo" in outcome.out and "mezo" in outcome.out and "predicted" in outcome.out


def test_layers(align: Callable[..., Outcome]) -> None:
    layers = align("--per-layer", "--json").json()["layers"]
    assert layers.keys() == {"agzo", "mezo"}
    assert len(layers["agzo"]) == 15 and layers["agzo"].keys() == layers["mezo"].keys()
    assert "model.layers.1.mlp.up_proj" in align("--per-layer").out


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_plot(name: str, align: Callable[..., Outcome], tmp_path: Path) -> None:
    assert align("--per-layer", "--plot", tmp_path / name).code == 0
    assert (tmp_path / name.replace(".", "-layers.")).stat().st_size > 1000
    assert (tmp_path / name).stat().st_size > 1000


def test_options_reach_the_methods(align: Callable[..., Outcome]) -> None:
    one, four = (
        align("--methods", "agzo", "-o", f"rank={rank}", "--json").json()["methods"]["agzo"]["capture"]
        for rank in (1, 4)
    )
    assert one < four


def test_option_of_one_of_the_methods(align: Callable[..., Outcome]) -> None:
    one, four = (align("-o", f"rank={rank}", "--json").json()["methods"] for rank in (1, 4))
    assert one["mezo"] == four["mezo"] and one["agzo"] != four["agzo"]


def test_seed(align: Callable[..., Outcome]) -> None:
    one, again, other = (align("--seed", seed, "--json").json()["methods"] for seed in (1, 1, 2))
    assert one == again != other


def test_rows_of_your_own(zoft: Callable[..., Outcome], model: Path, data: Path) -> None:
    few = ("--methods", "agzo", "--estimates", 2, "--batches", 1, "--batch-size", 4, "--json")
    own = ("--data", data, "--template", "{sentence} It was", "--words", "0=terrible,1=great")
    named, described = (
        zoft("align", model, *task, *few).json()["methods"] for task in (("--task", "sst2", "--data", data), own)
    )
    assert described == named


def test_a_direction_for_each_example(align: Callable[..., Outcome]) -> None:
    facts = align("--methods", "agzo", "-o", "per_example=true", "--json").json()["methods"]["agzo"]
    assert facts["predicted_cosine"] is None and facts["cosine_mean"]
