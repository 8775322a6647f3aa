"""Runs killed at random moments and resumed, beside runs that were left alone.

    python benchmarks/kills.py --kills 60

Trains a tiny model by ``zoft train``, and again with ``kill -9`` at random moments: in a step, while a checkpoint is
written, in an evaluation, before training, and while the result is written. After every few kills the run is left to
end, and its weights, its run log and its evaluations are compared with those of the undisturbed run, bit for bit. A
resumed run is a process forked from this one, which has imported everything already. Writes results/kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import Value
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import make_model, make_rows

import zoft.train.assemble as assemble
import zoft.train.run as run
from zoft.cli import main as zoft
from zoft.train.files import write_json
from zoft.train.task_trainer import TaskTrainer

METHODS = {
    "mezo": ("--lr", "1e-3"),
    "lozo-m": ("--lr", "1e-3", "--accumulate", "2"),
    "agzo": ("--lr", "1e-3", "--schedule", "linear"),
    "zo-act": (),
    "guided": (),
    "fo-adamw": ("--lr", "1e-3"),
    "mezo --guard": ("--lr", "0.1", "--guard"),  # which goes back on the way
}
STEPS, KILLS_A_RUN = 32, 8
PHASES = {"loading": 1, "step": 12, "evaluation": 6, "checkpoint": 4, "result": 2}  # how often they come, at most
PATCHED: list[tuple[Any, str, str]] = [
    (assemble, "load_model", "loading"),
    (TaskTrainer, "training_step", "step"),
    (TaskTrainer, "evaluate", "evaluation"),
    (TaskTrainer, "_save_checkpoint", "checkpoint"),
    (TaskTrainer, "save_model", "result"),
    (run, "write_report", "result"),
]


def start(arguments: list[str], phase: Any) -> int:
    """``zoft`` in a process of its own, which notes in `phase` what it is at; its number."""
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for owner, name, label in PATCHED:
        setattr(owner, name, noted(getattr(owner, name), [*PHASES].index(label) + 1, phase))
    sys.argv = ["zoft", *arguments]
    try:
        zoft()
    except SystemExit as ended:
        os._exit(ended.code if isinstance(ended.code, int) else 0)
    os._exit(3)


def noted(function: Callable[..., Any], number: int, phase: Any) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        before, phase.value = phase.value, number
        try:
            return function(*args, **options)
        finally:
            phase.value = before

    return call


def kill(child: int, phase: Any, draw: random.Random) -> str | None:
    """Kill `child` at a random moment around a phase drawn at random; what it was at, or None if it ended before."""
    label, inside = draw.choice([*PHASES]), False
    wanted, entries = [*PHASES].index(label) + 1, draw.randint(1, PHASES[label])
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(1e-4)
        now = phase.value == wanted
        if now and not inside:
            entries -= 1
        inside = now
        if now and entries <= 0:
            time.sleep(draw.random() * 0.02)
            at = phase.value
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return [*PHASES][at - 1] if at else "between"
    return None


def left(out: Path) -> tuple[dict[str, torch.Tensor], bytes, list[Any]]:
    """Of the run in `out` the weights, the log of the steps, and the evaluations."""
    [file] = [*out.glob("model/*.safetensors"), *out.glob("adapter/*.safetensors")]
    log = out / "steps.bin"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [(line["step"], line["eval_loss"], line["forwards"]) for line in lines if "eval_loss" in line]
    return load_file(file), log.read_bytes() if log.is_file() else b"", evaluations


def same(one: Path, other: Path) -> bool:
    (first, log, curve), (second, other_log, other_curve) = left(one), left(other)
    equal = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return equal and log == other_log and curve == other_curve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kills.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw, phase, started = random.Random(arguments.seed), Value("i", 0), time.perf_counter()
    killed: Counter[str] = Counter()
    runs, different = 0, []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        few = [str(make_model(place / "model")), "--task", "sst2", "--data", str(make_rows(place / "rows"))]
        few += ["--steps", str(STEPS), "--eval-steps", "4", "--save-steps", "4", "--batch-size", "8", "--device", "cpu"]
        while killed.total() < arguments.kills:
            method = [*METHODS][runs % len(METHODS)]
            whole, out = place / f"whole-{method}", place / f"run-{runs}"
            train = ["train", *few, "--method", method.split()[0], *METHODS[method]]
            if not whole.is_dir():
                assert finish(start([*train, "--out", str(whole)], phase)) == 0
            for _ in range(KILLS_A_RUN):
                phase.value = 0
                resume = ["train", "--resume", str(out)] if (out / "config.yaml").is_file() else None
                at = kill(start(resume or [*train, "--out", str(out)], phase), phase, draw)
                if at is not None:
                    killed[at] += 1
            resume = ["train", "--resume", str(out)] if (out / "config.yaml").is_file() else None
            code = finish(start(resume or [*train, "--out", str(out)], phase))
            if code or not same(whole, out):
                different.append({"method": method, "run": runs, "code": code})
            runs += 1
            print(f"{killed.total()} kills, {runs} runs, {len(different)} not the same", flush=True)
    facts = {"kills": killed.total(), "moments": dict(killed), "runs": runs, "different": different}
    write_json(arguments.out, facts | {"seconds": round(time.perf_counter() - started)})
    sys.exit(bool(different))


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
