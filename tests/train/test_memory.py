"""`zoft.train.memory`: the resident set of a process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoft.train import memory

CPU = torch.device("cpu")
GIB = 2**30


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset a peak")
def test_reset() -> None:
    block = torch.ones(GIB // 4)
    del block
    high = memory.peak_memory_bytes(CPU)
    assert memory.reset_peak_memory(CPU)
    assert high - memory.peak_memory_bytes(CPU) > GIB // 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the system counts otherwise")
def test_a_process_does_not_begin_at_the_peak_of_the_one_that_started_it() -> None:
    block = torch.ones(GIB // 2)
    show = f"import runpy; print(runpy.run_path({memory.__file__!r})['peak_memory_bytes']())"
    found = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert int(found.stdout) < block.numel() * block.element_size()
