"""Measurements: how estimates align with the true gradient, how finite differences err."""

from zoft.bench.align import Alignment, align, expected_cosine
from zoft.bench.curve import Ladder, finite_difference_errors

__all__ = ["Alignment", "Ladder", "align", "expected_cosine", "finite_difference_errors"]
