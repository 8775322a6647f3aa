"""The table of architectures: AGZO's cosine is the theorem's on every kind of model, and guided finds the streams."""

import pytest

from scripts import load

TABLE = load("benchmarks/architectures.py")
NO_STREAM = ("T5 (encoder-decoder)", "ViT (images)")


@pytest.mark.parametrize("name", TABLE.MODELS)
def test_row(name: str) -> None:
    row = TABLE.measure(name, estimates=40)
    assert 0 < row["caught"] < 1
    if "experts" not in name:  # a probe may change a token's experts, which is a jump of the loss
        assert row["linear"] > 0.3
        assert abs(row["agzo"] - row["predicted"]) < 4 * row["error"]
    if name in NO_STREAM:
        assert row["guided"] is None and row["why"]
    else:
        assert row["guided"] > 0.1
