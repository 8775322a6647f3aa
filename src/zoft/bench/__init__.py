"""Measurements: how estimates align with the true gradient, and how finite differences err."""

from zoft.bench.align import Alignment, align, expected_cosine
from zoft.bench.curve import finite_difference_errors
from zoft.bench.energy import captured_energy

__all__ = ["Alignment", "align", "captured_energy", "expected_cosine", "finite_difference_errors"]
