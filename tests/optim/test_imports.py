"""The core stands alone."""

import subprocess
import sys

PROGRAM = """
import sys
import numpy, torch
before = set(sys.modules)
import zoft.optim
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
print(*sorted(name for name in sys.modules if name.startswith("zoft")))
"""


def test_the_core_imports_nothing_but_torch_and_numpy() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    packages, modules = (set(line.split()) for line in run.stdout.splitlines())
    assert packages - {"torch", "numpy"} == {"zoft"}
    assert {m for m in modules if not m.startswith("zoft.optim")} == {"zoft"}
