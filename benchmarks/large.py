"""A model that first-order training cannot fit: 1.5 billion parameters within 8 GiB, as the operating system enforces.

    python benchmarks/large.py

Llama's architecture with random weights in bfloat16, batches of 16 x 64 tokens, three steps of each method in a process
of its own, whose private memory is limited (RLIMIT_DATA). AdamW holds float32 weights, as `zoft train` has it. Writes
results/large.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scaling import build

from zoft.bench.step import WHOLE, Clock, training_step
from zoft.train import random_batch
from zoft.train.files import write_json
from zoft.train.memory import peak_memory_bytes

METHODS, LIMIT, BATCH, LENGTH, STEPS = ("guided", "agzo", "zo-act", "fo-adamw"), 8 << 30, 16, 64, 3


def run(method: str) -> dict[str, Any]:
    """Three steps of `method` under the limit."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    model = build("1.5")
    if method.startswith("fo-"):
        model.float().train()
    batch = random_batch(model, BATCH, LENGTH)
    step, clock = training_step(method, model, batch, {"model": "", "dtype": "bfloat16"}), Clock(model.device)
    start = time.perf_counter()
    for _ in range(STEPS):
        with clock(WHOLE):
            step(clock)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": STEPS,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_bytes": peak_memory_bytes(model.device),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=METHODS, help="this one, in this process")
    method = parser.parse_args().method
    if method is not None:
        print(json.dumps(run(method)))
        return
    rows = []
    for method in METHODS:
        found = subprocess.run([sys.executable, __file__, "--method", method], capture_output=True, text=True)
        lines = (found.stdout if found.returncode == 0 else found.stderr).strip().splitlines() or [""]
        outcome = json.loads(lines[-1]) if found.returncode == 0 else {"failed": lines[-1]}
        rows.append({"method": method} | outcome)
        print(rows[-1], flush=True)
    facts = {"limit_bytes": LIMIT, "batch_size": BATCH, "length": LENGTH, "threads": torch.get_num_threads()}
    write_json(Path(__file__).parent / "results" / "large.json", facts | {"rows": rows})


if __name__ == "__main__":
    main()
