"""A model that stays on disk: memory and seconds of a step while its weights are loaded for each forward.

    python benchmarks/offload.py

Llama's architecture with 0.5 billion random parameters in bfloat16, one gigabyte in a file, batches of 4 x 32 tokens;
loaded by transformers with every weight on disk (``device_map``, ``offload_folder``), once for each method, whose steps
take turns; and once in memory. Before every forward the file is dropped from the system's cache, as a model too large
for it would be. Writes results/offload.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from scaling import build
from transformers import AutoModelForCausalLM

import zoft
from zoft.train.files import write_json
from zoft.train.memory import peak_memory_bytes, reset_peak_memory

METHODS: dict[str, Any] = {
    "zo-act": zoft.ZOAct,
    "zo-act, batched": lambda model: zoft.ZOAct(model, probe_batching=True),
    "guided": zoft.Guided,
}
ROWS = {"disk": list(METHODS), "memory": ["zo-act"]}
BATCH, LENGTH, ROUNDS = 4, 32, 4


def drop(path: Path) -> None:
    """Let the system forget what it has read of the file."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def run(folder: Path, where: str) -> dict[str, Any]:
    """Steps on the model in `folder`; the first of each method, which takes the bases, is not timed."""
    places = {"device_map": {"model": "disk", "lm_head": "disk"}, "offload_folder": folder / "offload"}
    reset_peak_memory()
    before = peak_memory_bytes()
    optimizers = {}
    for method in ROWS[where]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", **(places if where == "disk" else {}))
        model.register_forward_pre_hook(lambda *_: drop(folder / "model.safetensors"))
        optimizers[method] = METHODS[method](model.eval())
    inputs = torch.randint(model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {method: [] for method in optimizers}
    for _ in range(ROUNDS):
        for method, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step(lambda o=optimizer: zoft.cross_entropy(o.model(inputs, logits_to_keep=2).logits, inputs))
            seconds[method].append(time.perf_counter() - start)
    return {
        "fastest_step_seconds": {method: round(min(taken[1:]), 2) for method, taken in seconds.items()},
        "memory_before_loading_bytes": before,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--row", nargs=2, metavar=("FOLDER", "WHERE"), help="this one, in this process")
    row = parser.parse_args().row
    if row is not None:
        print(json.dumps(run(Path(row[0]), row[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = build("0.5")
        model.save_pretrained(folder)
        facts = {"parameters": sum(p.numel() for p in model.parameters()), "model_bytes": model.get_memory_footprint()}
        del model
        found = {}
        for where in ROWS:
            command = [sys.executable, __file__, "--row", folder, where]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[where] = json.loads(done.stdout.splitlines()[-1])
            print(where, found[where], flush=True)
    facts |= {"batch_size": BATCH, "length": LENGTH, "timed_steps": ROUNDS - 1, "threads": torch.get_num_threads()}
    write_json(Path(__file__).parent / "results" / "offload.json", facts | found)


if __name__ == "__main__":
    main()
