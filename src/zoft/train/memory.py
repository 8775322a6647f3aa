"""Peak memory of this process."""

from __future__ import annotations

import ctypes
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most memory held since the process began, or since `reset_peak_memory`.

    That of `device`'s allocator (None: the accelerator's, if there is one), or of the resident set where no allocator
    counts.
    """
    allocator = _allocator(device)
    if allocator is not None:
        return int(allocator.max_memory_allocated(device))
    with suppress(OSError):  # Linux; getrusage would begin at the peak of the process that started this one
        peak = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if peak is not None:
            return int(peak[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, others kibibytes


def reset_peak_memory(device: torch.device | None = None) -> bool:
    """Let the peak begin again at what is held now; False where a resident set's cannot (elsewhere than on Linux).

    What has been freed is no longer held: glibc, which would keep it, is told to give it back.
    """
    allocator = _allocator(device)
    if allocator is not None:
        allocator.reset_peak_memory_stats(device)
        return True
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _allocator(device: torch.device | None) -> Any:
    """The module whose allocator counts for `device`; None if there is none."""
    device = device or torch.accelerator.current_accelerator()
    module = None if device is None or device.type == "cpu" else torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") else None
