"""What a run has come to: its files read back, a page about it, and plots."""

from .page import write_report
from .run import Run, read_run

__all__ = ["Run", "read_run", "write_report"]
