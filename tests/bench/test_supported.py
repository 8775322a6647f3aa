"""The README's section on weights, loops and architectures is what the script makes."""

from pathlib import Path

import pytest

from scripts import ROOT, load

TABLE = load("benchmarks/supported.py")


def test_the_readme_has_the_section_as_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOFT_CACHE", str(tmp_path / "cache"))
    made = TABLE.section(TABLE.tiny_gguf(tmp_path / "tiny.gguf"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.partition(TABLE.BEGIN)[2].partition(TABLE.END)[0] == made
    assert "?" not in made  # nothing was trained in vain


def test_refusals_and_failures_have_cells_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOFT_CACHE", str(tmp_path / "cache"))
    model = TABLE.load(TABLE.tiny_gguf(tmp_path / "tiny.gguf"), "float32")
    assert TABLE.moved(model, lambda m: TABLE.MeZO(m, lr=0.0)) == "?"
    assert TABLE.moved(model, lambda m: TABLE.MeZO(m, lr=-1.0)) == "–"
