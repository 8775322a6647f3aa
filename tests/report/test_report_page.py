import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import EXAMPLES, LINES, SUMMARY, evaluation_line, training_line

from zoft.errors import UserError
from zoft.report import write_report


def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def title(html: str) -> str:
    return re.search("<title>(.*)</title>", html)[1]


def tiles(html: str) -> dict[str, str]:
    return dict(re.findall(r'<dt>([\w ]+)</dt><dd class="value">(.*?)</dd>', html))


def table(html: str) -> dict[str, str]:
    return dict(re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td></tr>', html))


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that every element is closed."""

    VOID = ("meta", "path", "use", "rect")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag


def test_figures_of_a_finished_run(make_run):
    html = page(make_run())
    assert title(html) == (
        "AGZO took SmolLM2-135M-Instruct from 53.1% to 71.9% accuracy on SST-2 in 600 forwards, 4 min 10 s"
    )
    assert tiles(html) == {
        "Before": "53.1%",
        "Kept": "71.9%",
        "At the end": "69.4%",
        "Forwards": "600",
        "Time": "4 min 10 s",
        "A step": "0.83 s",
        "Peak memory": "1.50 GiB",
        "Skipped": "3",
    }
    assert "+18.8 points" in html
    assert "Accuracy on 400 validation examples, standard error at most 2.5 points" in html
    assert "step 200" in html
    assert {"Forwards a step": "2", "method_options.rank": "1", "lr": "0.0003"}.items() <= table(html).items()
    assert table(html)["Examples cut to fit"] == "train 12, dev 0, validation 0"
    assert "zoft train --config runs/sst2/config.yaml --out runs/sst2-again" in html


def test_curves_mark_start_and_best(make_run):
    html = page(make_run())
    assert html.count("<svg") == 2
    assert "start 54.0%" in html
    assert "best 73.5%" in html
    assert "Accuracy on 200 dev examples" in html


def test_a_run_that_got_no_better(make_run):
    html = page(make_run(lines=[evaluation_line(0, 0.6), evaluation_line(10, 0.5)]))
    assert "start, the best 60.0%" in html


def test_one_file_that_needs_nothing_else(make_run):
    html = page(make_run())
    tags = Tags(html)
    assert not {"script", "link", "img", "iframe", "image"} & set(tags.names)
    assert "http" not in html
    assert all(value.startswith("#") for name, value in tags.attributes if name in ("href", "xlink:href", "src"))
    ids = [value for name, value in tags.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html)
    assert targets and {a or b for a, b in targets} <= set(ids)


def test_text_of_others_is_escaped(make_run):
    evil = '<script>alert("x")</script>'
    config = {"model": evil, "task": evil, "method": evil, "out": evil, evil: evil}
    html = page(
        make_run(
            config=config,
            summary=None,
            examples=[EXAMPLES[0] | dict.fromkeys(("prompt", "answer", "before", "after"), evil)],
        )
    )
    assert "script" not in Tags(html).names
    assert html.count("&lt;script&gt;") > 6


def test_right_and_wrong_are_said_in_words(make_run):
    html = page(make_run())
    assert "a &lt;b&gt;bold&lt;/b&gt; &amp; witty film" in html
    verdicts = re.findall(r'<dt>(\w+)</dt>\s*<dd><span class="output">(\w+)</span> <span .*?>(.*?)</span>', html)
    assert verdicts == [("Before", "terrible", "✗ wrong"), ("After", "great", "✓ right")]


def test_where_right_and_wrong_are_unknown_nothing_is_said(make_run):
    unknown = {"before": None, "after": None}
    html = page(make_run(examples=[EXAMPLES[0] | {"right": unknown}]))
    assert "✗ wrong" not in html and "✓ right" not in html


def test_a_metric_that_is_not_finite(make_run):
    html = page(make_run(summary=SUMMARY | {"metric": "likelihood", "final": None, "best": None}))
    assert tiles(html)["Kept"] == "nan"


def test_an_unfinished_run(make_run):
    html = page(make_run(summary=None, examples=None))
    assert title(html).endswith("from 54.0% to 70.0% accuracy on SST-2 in 600 forwards, 2 min 30 s so far")
    assert {"Now": "70.0%", "Best": "73.5%"}.items() <= tiles(html).items()
    assert "has not finished" in html
    assert "Before and after" not in html


def test_without_evaluations(make_run):
    html = page(make_run(lines=[training_line(10), training_line(20)], summary=None))
    assert title(html) == "AGZO trained SmolLM2-135M-Instruct on SST-2 in 40 forwards, 10 s so far"
    assert html.count("<svg") == 1


@pytest.mark.parametrize(
    ("lines", "curves"),
    [([], 0), ([training_line(10)], 1), ([evaluation_line(0, 0.5)], 1), ([training_line(10, loss=float("nan"))], 0)],
)
def test_hardly_any_lines(make_run, lines: list, curves: int):
    assert page(make_run(lines=lines, summary=None, examples=None)).count("<svg") == curves


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model/config.json", "model/tokenizer_config.json"], ["AutoModelForCausalLM", "runs/sst2/model"]),
        (["adapter/adapter_config.json"], ["AutoPeftModelForCausalLM", "runs/sst2/adapter", "HuggingFaceTB/"]),
        ([], []),
    ],
)
def test_how_to_load_the_result(make_run, files: list[str], expected: list[str]):
    folder = make_run()
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("{}")
    code = "".join(re.findall(r"<pre>(from.*?)</pre>", page(folder), re.DOTALL))
    assert bool(code) == bool(files)
    assert all(word in code for word in expected)


def test_the_same_bytes_for_the_same_files(make_run):
    assert write_report(make_run(name="a")).read_bytes() == write_report(make_run(name="b")).read_bytes()


def test_the_old_page_stays_until_the_new_one_is_whole(make_run, monkeypatch):
    folder = make_run()
    old = page(folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[:5]))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(UserError, match=r"report\.html: No space left"):
            write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == old
    assert page(folder) != old
    assert not list(folder.glob(".*"))


def test_importing_costs_little():
    code = "import sys, zoft.report, zoft.report.plots; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"matplotlib", "torch", "jinja2"} & set(loaded)
