"""Measurements: how estimates align with the true gradient."""

from zoft.bench.align import Alignment, align, expected_cosine

__all__ = ["Alignment", "align", "expected_cosine"]
