"""Peak memory of training steps and of plain inference on the same batch, each point in a process of its own.

On an accelerator its allocator counts. On the CPU the resident set does, and three things would blur it:

- Loading a checkpoint may take more than training: the peak is reset afterwards (on Linux; `peak_reset` says whether
  it was).
- Weights are mapped from their file, and become resident as they are read: the baseline is taken after one token has
  been run, so that it holds interpreter, libraries and model, and what lies above it is the work's own.
- glibc keeps what is freed, so that a peak shows the past: `ALLOCATOR` has it give all larger blocks back at once.
  That costs time, so nothing is timed here.

Methods run as `zoft train` runs them: first-order references hold float32 weights (LoRA beside its
adapter the checkpoint's) and compute in bfloat16.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zoft.bench.process import run_zoft
from zoft.bench.step import Clock, forwards, training_step, with_options
from zoft.train.adapter import without
from zoft.train.arithmetic import settle_arithmetic
from zoft.train.batches import random_batch
from zoft.train.config import ComputeDtype, TrainConfig
from zoft.train.memory import peak_memory_bytes, reset_peak_memory
from zoft.train.models import load_model
from zoft.train.optimizers import FIRST_ORDER

INFERENCE, CHECKPOINTED = "inference", "+checkpointing"
STEPS = 2  # the second finds the states that the first has made
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Record = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """What one process measures.

    `row` is a method, with options if need be (`zoft.bench.step.with_options`), a first-order one with `CHECKPOINTED`
    after it, or `INFERENCE`. The tokens are those of `texts`, all of them learned, or stand before a label word.
    """

    model: str
    row: str
    length: int
    batch_size: int = 1
    dtype: str = "auto"
    compute_dtype: ComputeDtype = "auto"
    device: str | None = None
    texts: bool = False

    def measure(self) -> Record:
        """The peak of this process, its baseline and what lies above, whether the peak was reset after loading, and
        the dtype in which weights are held."""
        method = self.row.removesuffix(CHECKPOINTED)
        settings: dict[str, Any] = {"model": self.model, "dtype": self.dtype, "device": self.device}
        name, _ = with_options(method)
        first_order = name in FIRST_ORDER
        dtype = TrainConfig(**settings, method=name).weights_dtype if first_order else self.dtype
        model = without(load_model(self.model, dtype=dtype, device=self.device)[0])
        settings["compute_dtype"] = settle_arithmetic(model, self.compute_dtype)
        batch = random_batch(model, self.batch_size, self.length, texts=self.texts)
        clock = Clock(model.device)
        forwards(model, random_batch(model, 1, 1), 1)(clock)
        model.train(first_order)
        if self.row.endswith(CHECKPOINTED):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        gc.collect()
        reset = reset_peak_memory(model.device)
        baseline = peak_memory_bytes(model.device)
        plain = self.row == INFERENCE
        step = forwards(model, batch, 1) if plain else training_step(method, model, batch, settings)
        for _ in range(STEPS):
            step(clock)
        peak = peak_memory_bytes(model.device)
        return {
            "peak_memory_bytes": peak,
            "baseline_memory_bytes": baseline,
            "above_baseline_bytes": peak - baseline,
            "peak_reset": reset,
            "weights_dtype": str(model.dtype).removeprefix("torch."),
        }

    def measure_apart(self) -> Record:
        """The same in a process of its own; `failed` says what ended it, or is None.

        Raises:
            UserError: the method or the model refuses.
        """
        command = ["bench", "memory-point", json.dumps(asdict(self))]
        out, failed = run_zoft(command, f"{self.row} at length {self.length}", ALLOCATOR)
        return {"failed": failed} | ({} if failed else json.loads(out))


def with_checkpointing(methods: Sequence[str]) -> list[str]:
    """The rows of `methods`, first-order ones with gradient checkpointing as well."""
    rows = []
    for method in methods:
        rows.append(method)
        if with_options(method)[0] in FIRST_ORDER:
            rows.append(method + CHECKPOINTED)
    return rows


def compare(
    model: str,
    rows: Sequence[str],
    lengths: Sequence[int],
    batch_size: int = 1,
    dtype: str = "auto",
    compute_dtype: ComputeDtype = "auto",
    device: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
    texts: bool = False,
) -> list[Record]:
    """A record for each length and row: inference, and then `rows`.

    It is `Point.measure_apart`'s and: `method` (the row), `length`, and `ratio` and `ratio_above_baseline`, to
    inference at the same length; None where a process failed.
    """
    records = []
    for length in lengths:
        plain: Record = {}
        for row in (INFERENCE, *rows):
            progress(f"{row} at length {length}")
            found = Point(model, row, length, batch_size, dtype, compute_dtype, device, texts).measure_apart()
            plain = plain or found
            found["ratio"] = _ratio(found, plain, "peak_memory_bytes")
            found["ratio_above_baseline"] = _ratio(found, plain, "above_baseline_bytes")
            records.append({"method": row, "length": length} | found)
    return records


def _ratio(found: Record, plain: Record, figure: str) -> float | None:
    return found[figure] / plain[figure] if found.get(figure) is not None and plain.get(figure) else None
