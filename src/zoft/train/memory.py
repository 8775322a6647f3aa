"""Peak memory of this process."""

from __future__ import annotations

import sys

import torch


def peak_memory_bytes() -> int:
    """The most memory held so far: the accelerator allocator's peak if there is one, else the resident set's."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and hasattr(torch.get_device_module(accelerator), "max_memory_allocated"):
        return int(torch.get_device_module(accelerator).max_memory_allocated())
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
