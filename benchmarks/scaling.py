"""How the cost of a step grows with parameters, tokens and steps, on random weights.

    python benchmarks/scaling.py

Llama's architecture in bfloat16 with 0.1, 0.5 and 1.5 billion parameters, batches of 16 x 32 tokens; the smallest at
16 x 128 too. Seconds of a step beside those of two plain forwards of the same batch (`zoft bench step`), their ratio,
and the first and the last of a longer run's steps. Writes results/scaling.json.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zoft.bench.step import WHOLE, Clock, time_steps, training_step
from zoft.train import random_batch
from zoft.train.files import write_json

METHODS = ("agzo", "zo-act", "guided")
ROUNDS, RUN = 5, 40
SIZES: dict[str, dict[str, int]] = {
    "0.1": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "0.5": {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 20},
    "1.5": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 28, "num_attention_heads": 16},
}


def build(size: str) -> Any:
    """A model of about `size` billion parameters."""
    config = LlamaConfig(vocab_size=32_000, tie_word_embeddings=True, **SIZES[size])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def main() -> None:
    rows: list[dict[str, Any]] = []
    for size, length in (("0.1", 32), ("0.1", 128), ("0.5", 32), ("1.5", 32)):
        model = build(size)
        count = sum(p.numel() for p in model.parameters())
        found = time_steps(METHODS, model, random_batch(model, 16, length), ROUNDS)
        for method, facts in found.items():
            kept = {name: facts[name] for name in ("seconds_per_step", "seconds_two_forwards", "ratio")}
            rows.append({"parameters": count, "length": length, "method": method} | kept)
            print(rows[-1], flush=True)
    model = build("0.1")
    runs = {}
    for method in METHODS:
        step = training_step(method, model, random_batch(model, 16, 32), {"model": "", "dtype": "bfloat16"})
        clock = Clock(model.device)
        for _ in range(RUN + 1):
            with clock(WHOLE):
                step(clock)
        seconds = clock.parts[WHOLE][1:]
        runs[method] = {"first_ten": median(seconds[:10]), "last_ten": median(seconds[-10:])}
        print(method, runs[method], flush=True)
    facts = {"batch_size": 16, "rounds": ROUNDS, "threads": torch.get_num_threads(), "steps_of_run": RUN}
    write_json(Path(__file__).parent / "results" / "scaling.json", facts | {"rows": rows, "runs": runs})


if __name__ == "__main__":
    main()
