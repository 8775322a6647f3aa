"""`zoft.bench.suite` and `zoft.bench.rates`: what a suite says is to be run, and which learning rates are tried."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zoft.bench.accuracy import Results
from zoft.bench.rates import rate_name, search
from zoft.bench.suite import load_suite
from zoft.errors import UserError


@pytest.mark.parametrize(
    "best, most, chosen, tried",
    [
        ("1e-4", 5, "1e-4", ["3e-5", "1e-4", "3e-4"]),
        ("3e-4", 5, "3e-4", ["3e-5", "1e-4", "3e-4", "1e-3"]),
        ("1e-5", 5, "1e-5", ["3e-6", "1e-5", "3e-5", "1e-4", "3e-4"]),
        ("3e-6", 5, "3e-6", ["3e-6", "1e-5", "3e-5", "1e-4", "3e-4"]),  # at the end: no more may be tried
        ("1e-7", 3, "3e-5", ["3e-5", "1e-4", "3e-4"]),
        (
            "1e1",
            20,
            "1e1",
            ["3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1e0", "3e0", "1e1", "3e1"],
        ),
    ],
)
def test_search(best: str, most: int, chosen: str, tried: list[str]) -> None:
    found, rate = search("1e-4", lambda rate: -abs(float(rate) / float(best) - 1), most)
    assert (rate, list(found)) == (chosen, tried)


def test_search_asks_for_what_is_missing() -> None:
    known = {"3e-5": 0.1, "1e-4": 0.2}
    assert search("1e-4", known.get, 5) == ({"3e-5": 0.1, "1e-4": 0.2, "3e-4": None}, None)
    known["3e-4"] = 0.3
    assert search("1e-4", known.get, 5) == (known | {"1e-3": None}, None)


@pytest.mark.parametrize("lr, name", [(1e-4, "1e-4"), (3e-10, "3e-10"), (2.5e-3, "2.5e-3"), (1.0, "1e0"), (30, "3e1")])
def test_rate_name(lr: float, name: str) -> None:
    assert rate_name(lr) == name


@pytest.mark.parametrize(
    "method, steps",
    [
        ({"method": "mezo"}, 300),
        ({"method": "mezo", "options": {"probes": 2}}, 150),
        ({"method": "agzo"}, 300),
        ({"method": "agzo", "options": {"two_sided": True}}, 200),
        ({"method": "agzo", "options": {"include": "*q_proj*", "probes": 3}}, 150),
        ({"method": "zo-act", "options": {"two_sided": True}}, 300),
        ({"method": "zo-act", "options": {"rank": 64}}, 300),
        ({"method": "lozo-m", "options": {"per_example": True}}, 200),
        ({"method": "guided"}, 600),
        ({"method": "fo-adamw"}, 150),
        ({"method": "lora", "accumulate": 2}, 75),
        ({"method": "mezo", "forwards_per_step": 6}, 100),
    ],
)
def test_steps_of_a_budget_of_forwards(method: dict[str, Any], steps: int, results: Callable[..., Results]) -> None:
    suite = results(methods={"m": method}, first_order_forwards=4, search=False).suite
    settings = suite.cell("sst2", "m", "1e-4", 0).settings
    assert (settings["steps"], settings["eval_steps"]) == (steps, steps // 4)


def test_task_goes_over_suite_and_method_over_task(results: Callable[..., Results]) -> None:
    suite = results(
        tasks=[
            "rte",
            {"sst2": {"seeds": 7, "budget": {"steps": 40}, "evaluations": 2, "batch_size": 8, "data": "films"}},
        ],
        methods={"agzo": {}, "slow": {"method": "agzo", "batch_size": 4, "lr": 1e-3}},
        batch_size=16,
        eps=3e-3,
    ).suite
    plain, of_task, of_method = (
        suite.cell(*place, "1e-3", 0).settings for place in (("rte", "agzo"), ("sst2", "agzo"), ("sst2", "slow"))
    )
    assert [settings["batch_size"] for settings in (plain, of_task, of_method)] == [16, 8, 4]
    assert [settings["eps"] for settings in (plain, of_task, of_method)] == [3e-3] * 3
    assert "data" not in plain and of_task["data"] == "films"
    assert (of_task["steps"], of_task["eval_steps"]) == (40, 20)
    assert (suite.tasks["rte"].seeds, suite.tasks["sst2"].seeds) == ((0, 1), (7,))


def test_seconds_instead_of_steps(results: Callable[..., Results]) -> None:
    settings = results(budget={"seconds": 300}, evaluations=5).suite.cell("sst2", "agzo", "1e-4", 0).settings
    assert (settings["seconds"], settings["eval_seconds"]) == (300, 60)
    assert settings["steps"] == settings["eval_steps"] > 10**6


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"modle": "x"}, "suite.yaml: unknown setting 'modle'; did you mean model"),
        ({"lr": 1e-4}, "unknown setting 'lr'"),
        ({"model": None}, "no model"),
        ({"tasks": []}, "no tasks"),
        ({"tasks": ["sst3"]}, "unknown task 'sst3'; did you mean sst"),
        ({"tasks": ["sst2", "sst2"]}, "task sst2 is there twice"),
        ({"tasks": [{"sst2": {"bugdet": 3}}]}, "task sst2: unknown setting 'bugdet'; did you mean budget"),
        ({"tasks": [{"sst2": {"batch_size": "many"}}]}, "task sst2: batch_size must be of type int"),
        ({"methods": {"agz": {}}}, "method agz: unknown method 'agz'; did you mean agzo"),
        ({"methods": {"agzo": {"option": {}}}}, "method agzo: unknown setting 'option'; did you mean options"),
        ({"methods": {"agzo": {"options": {"ranks": 1}}}}, "method agzo has no option 'ranks'; did you mean rank"),
        ({"search": "rte"}, "method agzo: search must be true, false or a task of the suite, not 'rte'"),
        ({"search": 3}, "search must be of type str"),
        ({"methods": {"auto": {}}}, "method auto is settled when zoft train looks at the model"),
        ({"methods": {"agzo": {"lr": 2e-4}}}, "lr 2e-4: a search begins at 1 or 3 times a power of ten"),
        ({"methods": {"agzo": {"lr": 0}}}, "lr must be a number above 0"),
        ({"methods": {"a/b": {"method": "agzo"}}}, "method 'a/b': choose a name"),
        ({"methods": {"zero-shot": {"shots": 0}}}, "zero-shot is always there"),
        ({"methods": {"few": {"shots": 4, "lr": 1e-4}}}, "method few: .* leave out lr"),
        ({"methods": ["agzo"]}, "methods must be of type dict"),
        ({"budget": None}, "budget must be one of forwards, seconds, steps"),
        ({"budget": {"forwards": 6, "seconds": 3}}, "budget must be one of forwards, seconds, steps"),
        ({"budget": {"forward": 6}}, "unknown budget 'forward'; did you mean forwards"),
        ({"budget": {"forwards": 0}}, "budget forwards must be a number above 0"),
        ({"budget": {"forwards": 1}}, "agzo on sst2: steps must be at least 1"),
        ({"budget": {"seconds": 9}, "schedule": "linear"}, "agzo on sst2: a linear schedule needs the number of steps"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"seeds": []}, "seeds must be different numbers"),
        ({"max_rates": 2}, "max_rates must be at least 3"),
        ({"evaluations": 0}, "evaluations must be at least 1"),
        ({"dtype": "float31"}, "agzo on sst2: unknown dtype 'float31'"),
    ],
)
def test_mistakes(changed: dict[str, Any], message: str, results: Callable[..., Results]) -> None:
    with pytest.raises(UserError, match=message):
        results(**changed)


@pytest.mark.parametrize(
    "suite", sorted((Path(__file__).parents[2] / "benchmarks").glob("*.yaml")), ids=lambda p: p.stem
)
def test_suites_of_the_repository_load(suite: Path) -> None:
    assert load_suite(suite).methods
