"""`zoft.bench.accuracy`: which runs are made, and what is kept of each. The runs themselves are played."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

import zoft.bench.accuracy
import zoft.bench.process
from zoft.bench.accuracy import Results, seconds_left
from zoft.bench.cell import claimed
from zoft.bench.table import facts, sheets
from zoft.errors import UserError
from zoft.train.files import locked

from .conftest import SUITE, Runs, files, go


def test_search_with_the_first_seed_then_the_others_with_the_best(runs: Runs, results: Callable[..., Results]) -> None:
    runs.dev = lambda settings: {3e-4: 0.8, 1e-3: 0.6}.get(settings["lr"], 0.5)
    found = results(seeds=[4, 5, 6])
    go(found)
    assert runs.rates == [(3e-5, 4), (1e-4, 4), (3e-4, 4), (1e-3, 4), (3e-4, 5), (3e-4, 6)]
    names = ["zero-shot/s4", *(f"agzo/lr{rate}-s4" for rate in ("3e-5", "1e-4", "3e-4", "1e-3"))]
    assert files(found) == {f"sst2/{name}.json" for name in (*names, "agzo/lr3e-4-s5", "agzo/lr3e-4-s6")}


def test_without_search_and_in_context(runs: Runs, results: Callable[..., Results]) -> None:
    go(results(methods={"agzo": {"lr": 2e-4, "search": False}, "few": {"shots": 4}}, eval_examples=100, eps=1e-3))
    assert runs.rates == [(2e-4, 0), (2e-4, 1)]
    evaluations = [" ".join(words) for words in runs.commands if words[0] == "eval"]
    assert [
        (f"--shots {shots} --seed {seed} --examples 100" in line)
        for (shots, seed), line in zip([(0, 0), (4, 0), (4, 1)], evaluations, strict=True)
    ] == [True] * 3


def test_search_on_one_task_for_all(runs: Runs, results: Callable[..., Results]) -> None:
    """The other tasks wait for it, and do the search themselves if they alone are wanted."""
    runs.dev = lambda settings: {3e-4: 0.8, 1e-3: 0.6}.get(settings["lr"], 0.5)
    found = results(tasks=["rte", "sst2"], search="sst2")
    go(found, "rte/agzo")
    assert runs.rates == [(3e-5, 0), (1e-4, 0), (3e-4, 0), (1e-3, 0), (3e-4, 0), (3e-4, 1)]
    assert [settings["task"] for settings in runs.settings] == ["sst2"] * 4 + ["rte"] * 2
    go(found)
    assert runs.settings[-1]["task"] == "sst2" and runs.rates[6:] == [(3e-4, 1)]
    assert facts(found)["methods"]["agzo"]["tasks"]["rte"]["lr"] == "3e-4"


def test_what_is_kept(runs: Runs, results: Callable[..., Results], tmp_path: Path) -> None:
    found = results(
        methods={"adam": {"method": "fo-adamw", "lr": 1e-4, "search": False}}, seeds=0, first_order_forwards=4
    )
    go(found, data=tmp_path)
    record = json.loads((found.out / "sst2/adam/lr1e-4-s0.json").read_text())
    assert record["curve"] == [
        {"forwards": 0, "seconds": 0, "value": 0.5},
        {"forwards": 600, "seconds": 60, "value": 0.7},
    ]
    assert (record["forwards"], record["best"], record["failed"]) == (600, 0.71, None)
    assert record["command"] == "zoft train --config cell.yaml --out run --data DATA/sst2"
    assert record["settings"] | {"save_steps": record["settings"]["eval_steps"]} == runs.settings[-1]
    assert [words[-2:] for words in runs.commands] == [["--data", str(tmp_path / "sst2")]] * 2
    assert str(tmp_path) not in json.dumps(record)


def test_what_is_there_is_not_run_again(runs: Runs, results: Callable[..., Results]) -> None:
    go(results(), "*/agzo")
    assert runs.rates == [(3e-5, 0), (1e-4, 0), (3e-4, 0), (1e-4, 1)]
    go(results(seeds=[0, 1, 2]))
    assert runs.rates[4:] == [(1e-4, 2)]
    assert [words[0] for words in runs.commands] == ["train"] * 4 + ["eval", "train"]


def test_only(runs: Runs, results: Callable[..., Results]) -> None:
    found = results(tasks=["sst2", "rte"])
    go(found, "rte/z*")
    assert files(found) == {"rte/zero-shot/s0.json"}
    with pytest.raises(UserError, match="--only rte: the suite has no TASK/METHOD like it"):
        go(found, "*/agzo", "rte")


def test_first_seeds_come_first(runs: Runs, results: Callable[..., Results]) -> None:
    found = results(tasks=["sst2", "rte", "cb"], methods={"agzo": {"lr": 1e-4, "search": False}}, seeds=[2, 1])
    go(found, "sst2/agzo", "rte/agzo")
    assert [(s["task"], s["seed"]) for s in runs.settings] == [("sst2", 2), ("rte", 2), ("sst2", 1), ("rte", 1)]


def test_other_settings_are_an_error(runs: Runs, results: Callable[..., Results]) -> None:
    go(results())
    with pytest.raises(UserError, match=r"agzo/lr3e-5-s0\.json was run with steps 300; the suite now has 150"):
        go(results(budget={"forwards": 300}))
    with pytest.raises(UserError, match=r"json was run with batch_size None; the suite now has 8"):
        results(batch_size=8).all()


def test_a_broken_file_is_an_error(runs: Runs, results: Callable[..., Results]) -> None:
    go(results())
    (results().out / "sst2/agzo/lr1e-4-s0.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*agzo/lr1e-4-s0\.json"):
        results().all()


@pytest.mark.parametrize("code", [None, 130, 143])  # of the suite's process, or of the run's alone
def test_interrupted(code: int | None, runs: Runs, results: Callable[..., Results]) -> None:
    def stop(settings: dict[str, Any]) -> tuple[int, str]:
        if code is None:
            raise KeyboardInterrupt
        return code, "zoft: interrupted; continue with ..."

    runs.ends, found = stop, results()
    with pytest.raises(KeyboardInterrupt):
        go(found)
    assert files(found) == {"sst2/zero-shot/s0.json"}
    assert not list((found.out / "sst2" / "agzo").iterdir())
    runs.ends = lambda settings: (0, "")
    go(found)
    assert len(files(found)) == 5


def test_stopped_and_taken_up_again(runs: Runs, results: Callable[..., Results]) -> None:
    """The run goes on where it was; its seconds are those of both processes, not those between."""
    found = results(methods={"agzo": {"lr": 1e-4, "search": False}}, seeds=0)
    folder = found.out / "sst2/agzo/.lr1e-4-s0"

    def stop(settings: dict[str, Any]) -> tuple[int, str]:
        (folder / "run").mkdir()
        (folder / "run/config.yaml").write_text(yaml.safe_dump(settings))
        raise KeyboardInterrupt

    runs.ends = stop
    with pytest.raises(KeyboardInterrupt):
        go(found)
    os.utime(folder / "cell.yaml", (1000, 1000))  # began then, and was killed 50 s later
    for path in (folder, folder / "run", folder / "run/config.yaml"):
        os.utime(path, (1050, 1050))
    go(found)
    assert runs.commands[-1] == ["train", "--resume", str(folder / "run")]
    record = json.loads((found.out / "sst2/agzo/lr1e-4-s0.json").read_text())
    assert record["command"] == "zoft train --config cell.yaml --out run"
    assert 50 <= record["elapsed"] < 80 and record["best_dev"] == 0.7
    assert not folder.exists()


def test_a_stopped_run_of_other_settings_begins_anew(runs: Runs, results: Callable[..., Results]) -> None:
    methods = {"agzo": {"lr": 1e-4, "search": False}}
    folder = results().out / "sst2/agzo/.lr1e-4-s0"
    (folder / "run").mkdir(parents=True)
    (folder / "run/config.yaml").touch()
    (folder / "cell.yaml").write_text("lr: 0.0001\n")
    go(results(methods=methods, seeds=0))
    assert runs.commands[-1][:2] == ["train", "--config"] and not folder.exists()


def test_a_stopped_run_that_is_refused_stays(
    runs: Runs, results: Callable[..., Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = results(methods={"agzo": {"lr": 1e-4, "search": False}}, seeds=0)
    folder = found.out / "sst2/agzo/.lr1e-4-s0"

    def refuse(settings: dict[str, Any]) -> tuple[int, str]:
        (folder / "run").mkdir()
        (folder / "run/config.yaml").touch()
        return 2, "zoft: the disk is full"

    runs.ends = refuse
    with pytest.raises(UserError, match=r"s0: the disk is full$"):
        go(found)
    refused = CompletedProcess([], 2, "", "zoft: the rows are others")
    monkeypatch.setattr(zoft.bench.process, "_ended", lambda *_: refused)
    with pytest.raises(UserError, match=rf"s0: the rows are others. To begin this run anew, remove {folder}"):
        go(found)
    assert (folder / "run/config.yaml").is_file()


def test_failed_run_counts_as_the_untrained_model(runs: Runs, results: Callable[..., Results]) -> None:
    """Of 3e-5 and 1e-4 the one that ended is preferred, though both are worth what zero-shot is."""
    runs.dev = lambda settings: {1e-4: 0.5, 3e-4: 0.4}[settings["lr"]]
    runs.ends = lambda s: (1, "warning\nRuntimeError: a | b\n") if s["lr"] == 3e-5 or s["seed"] == 1 else (0, "")
    found = results()
    go(found)
    assert runs.rates == [(3e-5, 0), (1e-4, 0), (3e-4, 0), (1e-4, 1)]
    record = json.loads((found.out / "sst2/agzo/lr3e-5-s0.json").read_text())
    assert record["failed"] == "RuntimeError: a | b"
    result, tried, failed = sheets(facts(found))
    assert result.rows[1][:3] == ["agzo", "50.5 ± 0.5 (1 of 2 failed)", "50.5"]
    assert tried.rows == [["agzo", "3e-5: –, 1e-4: 50.0 (chosen), 3e-4: 40.0"]]
    lines = [["agzo", "sst2", f"lr {run}", "RuntimeError: a | b"] for run in ("3e-5, seed 0", "1e-4, seed 1")]
    assert failed.rows == lines
    assert "| RuntimeError: a \\| b |" in failed.markdown()


def test_failed_search(runs: Runs, results: Callable[..., Results]) -> None:
    """A failed rate is worth more than one that ended below zero-shot."""
    runs.dev = lambda settings: 0.3
    runs.ends = lambda settings: (1, "") if settings["lr"] == 1e-4 else (0, "")
    found = results(seeds=0)
    go(found)
    assert found.standing("sst2", "agzo").rate == "1e-4"
    assert sheets(facts(found))[2].rows[0][-1] == "ended with code 1"


def test_a_mistake_of_the_user_is_no_result(runs: Runs, results: Callable[..., Results]) -> None:
    runs.ends, found = (lambda settings: (2, "zoft: no such file")), results()
    with pytest.raises(UserError, match="sst2/agzo/lr3e-5-s0: no such file"):
        go(found)
    assert files(found) == {"sst2/zero-shot/s0.json"}


def test_claims(tmp_path: Path) -> None:
    file, lock = tmp_path / "row" / "lr1e-4-s0.json", tmp_path / "row" / "lr1e-4-s0.lock"
    with claimed(file) as ours:
        assert ours
        with claimed(file) as again:
            assert not again
        assert lock.exists()
    assert not lock.exists()

    lock.touch()  # of a process that has died
    with claimed(file) as ours:
        assert ours
    assert not list(lock.parent.iterdir())
    file.write_text("{}")
    with claimed(file) as ours:
        assert not ours


def test_waits_for_a_run_of_another_process(
    runs: Runs, results: Callable[..., Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = results(seeds=0)
    lock = found.out / "sst2/agzo/lr1e-4-s0.lock"
    lock.parent.mkdir(parents=True)
    slept = []
    with ExitStack() as other:
        other.enter_context(locked(lock))

        def sleep(seconds: float) -> None:
            slept.append(runs.rates)
            other.close()

        monkeypatch.setattr(zoft.bench.accuracy.time, "sleep", sleep)
        go(found)
    assert slept == [[(3e-5, 0), (3e-4, 0)]]
    assert runs.rates == [*slept[0], (1e-4, 0)]


def test_time_left(runs: Runs, results: Callable[..., Results]) -> None:
    """Each run of agzo took 10 s, so the seed to come takes 10 s; of mezo nothing is known but the mean of all."""
    go(results(seeds=0), "*/agzo")
    for file in results().out.rglob("lr*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"elapsed": 10.0}))
    found = results(methods=SUITE["methods"] | {"mezo": {}}, seeds=[0, 1])
    go(found, "*/zero-shot")
    file = found.out / "sst2/zero-shot/s0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"elapsed": 2.0}))
    found = results(methods=SUITE["methods"] | {"mezo": {}}, seeds=[0, 1])
    [*agzo] = found.standing("sst2", "agzo").records
    assert seconds_left(found, found.all()) == pytest.approx(10 + 4 * (len(agzo) * 10 + 2) / (len(agzo) + 1))
