"""Measurements: how estimates align with the true gradient, and how finite differences err."""

from zoft.bench.align import Alignment, align, expected_cosine
from zoft.bench.curve import finite_difference_errors

__all__ = ["Alignment", "align", "expected_cosine", "finite_difference_errors"]
