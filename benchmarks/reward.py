"""A reward of generated text, the share of vowels in it: guided by answers drawn, and probes.

    python benchmarks/reward.py guided --data DATA --seconds 600

SmolLM2-135M-Instruct goes on from phrases of SST-2's training rows, 16 tokens. Every way trains in batches of 8 prompts
for so many seconds of its steps; 64 held-out prompts are answered, greedily, every so many. Writes
results/objective/reward-METHOD-lrLR-sSEED.json: the settings, those of `zoft train`, and the course of the reward.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from zoft.train import TrainConfig, train
from zoft.train.files import write_json

RESULTS = Path(__file__).parent / "results" / "objective"
POPULATION = {"leave_one_out": True, "shape": "rank"}
WAYS: dict[str, dict[str, Any]] = {
    "guided": {"method": "guided", "lr": 1e-3},
    "guided-attention": {"method": "guided", "method_options": {"attention": True}, "lr": 1e-3},
    "fo-adamw": {"method": "fo-adamw", "lr": 1e-5},
    "agzo": {"method": "agzo", "method_options": POPULATION | {"probes": 8}, "eps": 3e-2, "lr": 3e-3},
    "zo-act": {"method": "zo-act", "method_options": POPULATION | {"probes": 8}, "eps": 3e-2, "lr": 1e-3},
}


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(text.count(vowel) for vowel in "aeiou") / (1 + len(text)) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(WAYS))
    parser.add_argument("--data", type=Path, required=True, help="folder with the folder sst2")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = [json.loads(line) for line in (given.data / "sst2" / "train.jsonl").read_text().splitlines()]
    prompts = [row["sentence"].strip() for row in random.Random(0).sample(rows, 600)]
    way = WAYS[given.method] | ({"lr": given.lr} if given.lr else {})
    settings = way | {"seconds": given.seconds, "steps": 10_000, "seed": given.seed, "batch_size": 8}
    settings |= {"max_new_tokens": 16, "dev_examples": 64, "eval_examples": 64, "log_steps": 1}
    settings |= {"eval_steps": 10_000, "eval_seconds": given.seconds / 6}
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "prompts.jsonl", Path(folder) / "run"
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        config = TrainConfig(model="demo", data=str(data), objective=f"{__file__}:vowels", out=str(out), **settings)
        summary = train(config, Console())
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        examples = json.loads((out / "examples.json").read_text())
    named = {f"eval_{config.objective}": "held_out", "loss": "loss", "step": "step", "seconds": "seconds"}
    course = [{named[name]: value for name, value in line.items() if name in named} for line in lines]
    course = [line for line in course if "held_out" in line or "loss" in line]
    kept = {name: summary[name] for name in ("steps", "forwards", "initial", "final", "seconds", "peak_memory_bytes")}
    settings |= {"model": "demo", "lr": config.lr, "samples": asdict(config)["samples"]}
    name = f"reward-{given.method}-lr{config.lr:.0e}-s{given.seed}.json"
    write_json(RESULTS / name, {"settings": settings, **kept, "course": course, "examples": examples})


if __name__ == "__main__":
    main()
