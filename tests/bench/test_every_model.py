"""The survey of transformers' causal language models."""

import json

import pytest

from scripts import ROOT, load

TABLE = load("benchmarks/every_model.py")


@pytest.mark.parametrize("kind", ["glm4", "qwen3_5", "deepseek_v4"])
def test_row(kind: str) -> None:
    """As it stands in the results."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "every_model.json").read_text())["rows"]
    (expected,) = [row for row in rows if row["kind"] == kind]
    assert TABLE.measure(kind) == expected and ("none" in expected["guided"]) == (kind == "deepseek_v4")


def test_what_cannot_be_made_is_said() -> None:
    assert "axial_pos_embds" in TABLE.measure("reformer")["left_out"]


def test_a_probe_that_moves_weights_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(TABLE.AGZO):  # type: ignore[misc,name-defined]
        def estimate(self, closure: object) -> object:
            self.model.lm_head.weight.data.add_(1)
            return super().estimate(closure)

    monkeypatch.setattr(TABLE, "AGZO", Careless)
    with pytest.raises(AssertionError, match="weights have moved"):
        TABLE.measure("llama")
