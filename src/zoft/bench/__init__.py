"""Measurements: how estimates align with the true gradient, which step pays, what it costs, what is learnt by it."""

from zoft.bench.align import Alignment, align, expected_cosine
from zoft.bench.curve import Ladder, finite_difference_errors
from zoft.bench.doctor import Diagnosis, diagnose

__all__ = ["Alignment", "Diagnosis", "Ladder", "align", "diagnose", "expected_cosine", "finite_difference_errors"]
