from pathlib import Path

import pytest

from zoft.errors import UserError
from zoft.report.plots import metric_curve, running_median, save_comparison, save_lines

ROWS = [
    {"method": "mezo", "cosine_mean": 8e-5, "cosine_sem": 2e-5, "predicted_cosine": 9e-5, "capture": 1.0},
    {"method": "lozo", "cosine_mean": -2e-5, "cosine_sem": 4e-5, "predicted_cosine": 9e-5, "capture": 0.01},
    {"method": "guided", "cosine_mean": 0.41, "cosine_sem": 0.02, "predicted_cosine": None, "capture": None},
]


def test_running_median():
    assert running_median([3.0]) == [3.0]
    smooth = running_median([1.0] * 10 + [100.0] + [1.0] * 10)
    assert smooth == [1.0] * 21


@pytest.mark.parametrize("metric", ["matthews", "rewards.py:length"])
def test_a_correlation_or_a_reward_is_no_percentage(metric: str):
    lines = [{"forwards": 0, f"eval_{metric}": -0.05}, {"forwards": 20, f"eval_{metric}": 0.31}]
    svg = metric_curve(lines, metric)
    assert "best 0.310" in svg
    assert "%" not in svg


def test_comparison_names_methods_and_figures(tmp_path: Path):
    path = tmp_path / "cosine.svg"
    save_comparison(path, ROWS, "SST-2")
    first = path.read_bytes()
    for text in ("mezo", "lozo", "guided", "-2e-05 ± 4e-05, captures 1%", "measured", "predicted", "SST-2"):
        assert text in first.decode()
    save_comparison(path, ROWS, "SST-2")
    assert path.read_bytes() == first


def test_comparison_without_a_positive_cosine(tmp_path: Path):
    save_comparison(tmp_path / "cosine.png", [ROWS[1] | {"predicted_cosine": None}])
    assert (tmp_path / "cosine.png").read_bytes().startswith(b"\x89PNG")


def test_lines(tmp_path: Path):
    lines = {f"method {number}": [(0, 0.1), (1, 0.2), (2, 0.3)] for number in range(12)}
    save_lines(tmp_path / "lines.svg", lines, "layer", "cosine")
    text = (tmp_path / "lines.svg").read_text(encoding="utf-8")
    assert "method 0" in text and "method 11" in text and "layer" in text and "cosine" in text


def test_unknown_kind_of_file(tmp_path: Path):
    with pytest.raises(UserError, match=r"plot\.xyz.*png.*svg"):
        save_lines(tmp_path / "plot.xyz", {"agzo": [(0, 0.1)]}, "layer", "cosine")
