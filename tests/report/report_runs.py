"""The content of a made-up run folder."""

from typing import Any

CONFIG = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "task": "sst2",
    "method": "agzo",
    "method_options": {"rank": 1, "two_sided": False},
    "lr": 3e-4,
    "out": "runs/sst2",
}
SUMMARY = {
    "task": "sst2",
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "method": "agzo",
    "seed": 0,
    "steps": 300,
    "forwards": 600,
    "examples_seen": 4800,
    "metric": "accuracy",
    "initial": 0.531,
    "final": 0.694,
    "best": 0.719,
    "best_step": 200,
    "seconds": 250.4,
    "seconds_per_step": 0.835,
    "peak_memory_bytes": 3 * 2**29,
    "skipped": 2,
    "zero": 1,
    "examples": {"train": 4800, "dev": 200, "validation": 400},
    "truncated": {"train": 12, "dev": 0, "validation": 0},
    "zoft_version": "0.1.0",
}
EXAMPLES: list[dict[str, Any]] = [
    {
        "prompt": "a <b>bold</b> & witty film It was",
        "answer": "great",
        "before": "terrible",
        "after": "great",
        "right": {"before": False, "after": True},
    }
]


def training_line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "forwards": 2 * step, "seconds": step / 2, "loss": 1 / (1 + step), "skipped": 0} | values


def evaluation_line(step: int, accuracy: float) -> dict[str, Any]:
    line = {"step": step, "forwards": 2 * step, "seconds": step / 2, "eval_runtime": 3.0}
    return line | {"eval_loss": 0.7, "eval_accuracy": accuracy}


LINES = [
    evaluation_line(0, 0.54),
    *(training_line(step) for step in range(10, 301, 10)),
    evaluation_line(100, 0.62),
    evaluation_line(200, 0.735),
    evaluation_line(300, 0.70),
]
