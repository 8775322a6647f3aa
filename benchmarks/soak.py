"""Long runs of a tiny model by ``zoft train``: their memory and open files from the first step to the last. Linux.

    python benchmarks/soak.py

5,000 steps of each method, evaluated and saved every 100; resident memory and open files of the process are read every
half second. Of those: the medians of the second tenth of the run and of the last (the first tenth still loads), and
the growth over 1,000 steps in between. Writes results/soak.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tiny import make_model, make_rows
from transformers.trainer_utils import get_last_checkpoint

from zoft.train.files import read_json, write_json

METHODS = ["mezo", "agzo", "zo-act", "guided"]
EVERY = 100  # steps, of evaluations and checkpoints


def sample(process: int) -> tuple[int, int]:
    """Resident bytes and open files."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{process}/fd"))


def soak(command: list[str], out: Path, steps: int) -> dict[str, float]:
    """What the run of `command` into `out` comes to."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        samples = []
        while running.poll() is None:
            if out.is_dir() and get_last_checkpoint(str(out)):  # the first steps are over
                samples.append(sample(running.pid))
            time.sleep(0.5)
    assert running.returncode == 0
    tenth = len(samples) // 10
    early, late = samples[tenth : 2 * tenth], samples[-2 * tenth : -tenth]  # the end evaluates and writes a report
    first, last = (median(memory for memory, _ in some) for some in (early, late))
    summary = read_json(out / "summary.json")
    return {
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "samples": len(samples),
        "memory_early_bytes": first,
        "memory_late_bytes": last,
        "growth_per_1000_steps_bytes": round((last - first) / (0.7 * steps / 1000)),
        "files_early": median(files for _, files in early),
        "files_late": median(files for _, files in late),
        "log_bytes": (out / "steps.bin").stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        few = [str(make_model(place / "model")), "--task", "sst2", "--data", str(make_rows(place / "rows"))]
        few += ["--steps", str(arguments.steps), "--eval-steps", str(EVERY), "--save-steps", str(EVERY)]
        few += ["--batch-size", "8", "--device", "cpu"]
        for method in METHODS:
            out = place / method
            command = [sys.executable, "-m", "zoft", "train", *few, "--method", method, "--out", str(out)]
            found[method] = soak(command, out, arguments.steps)
            print(method, found[method], flush=True)
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
