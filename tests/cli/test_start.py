"""The command line as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from zoft.train import TrainConfig

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
CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
PRINT_CAPACITY = f"""
import os
from zoft.cli import main
try:
    main()
finally:
    print(os.environ["{CAPACITY}"])
"""


def python(*args: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, env=env)


def test_help_imports_nothing_slow() -> None:
    for command in ([], ["train"], ["bench", "memory"]):
        found = python("-c", SCRIPT, *command, "--help")
        assert found.returncode == 0
        assert "Usage" in found.stdout
        assert found.stdout.splitlines()[-1].strip() == "imported:"


def test_help_says_the_defaults() -> None:
    said = python("-m", "zoft", "train", "--help", env=os.environ | {"COLUMNS": "400"}).stdout.splitlines()
    for name in ("samples", "steps", "batch_size", "accumulate", "dev_examples", "eval_steps", "eval_batch_size"):
        [line] = [line for line in said if f"│ --{name.replace('_', '-')} " in line]
        assert f"Default: {getattr(TrainConfig, name)}." in line


def test_mistake(tmp_path: Path) -> None:
    found = python("-m", "zoft", "train", str(tmp_path), "--task", "bolq", "--out", str(tmp_path / "run"))
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr == "zoft: unknown task 'bolq'; did you mean boolq?\n"


@pytest.mark.parametrize(("given", "found"), [({}, "64"), ({CAPACITY: "7"}, "7")])
def test_few_compiled_products_are_kept_unless_the_user_says_how_many(given: dict[str, str], found: str) -> None:
    others = {name: value for name, value in os.environ.items() if name != CAPACITY}
    assert python("-c", PRINT_CAPACITY, env=others | given).stdout.split()[-1] == found
