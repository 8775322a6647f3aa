"""``search`` of benchmarks/sst2.py: the learning rate of the table."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("sst2", Path(__file__).parents[2] / "benchmarks" / "sst2.py")
assert _SPEC is not None and _SPEC.loader is not None
sst2 = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sst2)


@pytest.mark.parametrize("best", ["1e-6", "3e-5", "1e-4", "3e-4", "1e-2"])
def test_the_rate_found_is_best_and_lies_within_those_tried(best: str) -> None:
    """From 1e-4, downwards or upwards as far as it takes and no further."""
    tried = set()

    def dev(rate: str) -> float:
        tried.add(rate)
        return -abs(sst2.RATES.index(rate) - sst2.RATES.index(best))

    assert sst2.search("1e-4", dev) == best
    low, high = sorted((sst2.RATES.index("1e-4"), sst2.RATES.index(best)))
    assert tried == set(sst2.RATES[low - 1 : high + 2])
