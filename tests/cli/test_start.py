"""The command line as a process of its own."""

import subprocess
import sys
from pathlib import Path

SLOW = {"torch", "transformers", "numpy", "datasets", "matplotlib"}
SCRIPT = f"""
import sys
from zoft.cli import main
sys.argv = ["zoft", *sys.argv[1:]]
try:
    main()
finally:
    print("imported:", *sorted({SLOW} & sys.modules.keys()))
"""


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


def test_help_imports_nothing_slow() -> None:
    for command in ([], ["train"], ["bench", "memory"]):
        found = python("-c", SCRIPT, *command, "--help")
        assert found.returncode == 0
        assert "Usage" in found.stdout
        assert found.stdout.splitlines()[-1].strip() == "imported:"


def test_mistake(tmp_path: Path) -> None:
    found = python("-m", "zoft", "train", str(tmp_path), "--task", "bolq", "--out", str(tmp_path / "run"))
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr == "zoft: unknown task 'bolq'; did you mean boolq?\n"
