"""`zoft.bench.table`: the tables and curves that come of recorded runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zoft.bench.accuracy import Results
from zoft.bench.table import Sheet, curves, facts, sheets, write_tables
from zoft.report.plots import save_curves

from .conftest import Runs, go


def test_tables(runs: Runs, results: Callable[..., Results]) -> None:
    runs.dev = lambda s: (0.7 + 0.1 * s["seed"] if s["task"] == "sst2" else 0.2) - 0.1 * (s["lr"] == 3e-5)
    found = results(
        tasks=["sst2", {"squad": {"seeds": 0, "budget": {"forwards": 300}}}],
        methods={"agzo": {"lr": 1e-4}, "few": {"shots": 4}, "mezo": {"lr": 1e-4, "search": False}},
    )
    go(found, "*/[!m]*")
    go(found, "sst2/mezo")
    result, tried = sheets(write_tables(found))
    assert result.columns == ["method", "sst2", "squad (f1)", "mean", "forwards", "training", "peak memory"]
    assert result.rows == [
        ["zero-shot", "50.0", "50.0", "50.0", "–", "–", "1.00 GiB"],
        ["agzo", "76.0 ± 5.0", "21.0", "48.5", "300–600", "1 min 00 s", "1.00 GiB"],
        ["few", "50.0 ± 0.0", "50.0", "50.0", "–", "–", "1.00 GiB"],
        ["mezo", "76.0 ± 5.0", "–", "–", "600", "1 min 00 s", "1.00 GiB"],
    ]
    assert [row[0] for row in tried.rows] == ["agzo"]
    assert tried.rows[0][1:] == [
        "3e-5: 60.0, 1e-4: 70.0 (chosen), 3e-4: 70.0",
        "3e-5: 10.0, 1e-4: 20.0 (chosen), 3e-4: 20.0",
    ]
    text = (found.out / "table.md").read_text()
    assert "| agzo | 76.0 ± 5.0 | 21.0 | 48.5 | 300–600 |" in text and "| method | sst2 | squad |\n" in text
    assert (found.out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_unfinished_seeds_are_counted(runs: Runs, results: Callable[..., Results]) -> None:
    go(results(methods={"mezo": {"lr": 1e-4, "search": False}}))
    [result] = sheets(facts(results(methods={"mezo": {"lr": 1e-4, "search": False}}, seeds=[0, 1, 2])))
    assert result.rows[1][1] == "71.0 ± 0.0 (2 of 3 seeds)"


def test_wide_tables_are_parted() -> None:
    sheet = Sheet("many", ["method", "a", "long task", "c", "d"], [["mezo", "1", "2" * 30, "3", "4"]])
    parts = sheet.parts(width=20)
    assert [part.columns for part in parts] == [["method", "a"], ["method", "long task"], ["method", "c", "d"]]
    assert [part.rows for part in parts] == [[["mezo", "1"]], [["mezo", "2" * 30]], [["mezo", "3", "4"]]]
    assert sheet.parts(width=80) == [sheet]


def test_nothing_run_yet(results: Callable[..., Results]) -> None:
    found = results()
    result, tried = sheets(write_tables(found))
    assert [row[1:] for row in result.rows] == [["–"] * 5] * 2
    assert tried.rows == [["agzo", "3e-5: –, 1e-4: –, 3e-4: –"]]
    assert not (found.out / "curves.png").exists()


def test_curves_are_means_over_seeds(runs: Runs, results: Callable[..., Results], tmp_path: Path) -> None:
    runs.dev = lambda settings: 0.6 + 0.2 * settings["seed"]
    found = results(methods={"mezo": {"lr": 1e-4, "search": False}})
    go(found)
    assert curves(found) == {"sst2": {"mezo": [(0, 0, 0.5), (600, 60.5, pytest.approx(0.7))]}}
    save_curves(tmp_path / "curves.svg", {"SST-2": {"mezo": [(0, 0.0, 0.5), (600, 60.5, 0.7)], "agzo": []}})
    svg = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    for text in ("SST-2", "mezo", "agzo", "forward passes", "seconds of training", "600", "60"):
        assert f">{text}</text>" in svg
