"""The user's own texts and conversations: guided in three forms, beside first-order fine-tuning.

    python benchmarks/texts.py WAY --rows ROWS --data DATA --lr LR --seed SEED [--rank RANK]

SmolLM2-135M-Instruct, 60 steps as `zoft train` takes them, the rate falling linearly to 0. ROWS: `wikitext`, the lines
of WikiText-2 of more than 200 characters as `text` (64 tokens of each, batches of 8), or `gsm8k`, its problems as
conversations (up to 320 tokens, batches of 4). The loss on 40 held-out rows is taken before and after every 30 steps,
that on 120 validation rows before and at the end. LoRA's weights are float32: it is slow in bfloat16 on a CPU without
instructions for it. Writes results/texts/ROWS-WAY-lrLR-sSEED.json, the rank in the name too if it is not the method's
own, 8.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from zoft.train import TrainConfig, train
from zoft.train.files import write_json

RESULTS = Path(__file__).parent / "results" / "texts"
WAYS: dict[str, dict[str, Any]] = {
    "guided": {"method": "guided", "method_options": {"attention": False}},
    "guided-attention": {"method": "guided", "method_options": {"attention": True}},
    "guided-bases": {"method": "guided", "method_options": {"attention": True, "train_bases": True}},
    "lora": {"method": "lora", "dtype": "float32"},
    "fo-adamw": {"method": "fo-adamw"},
}
SIZES: dict[str, dict[str, Any]] = {
    "wikitext": {"batch_size": 8, "max_length": 64},
    "gsm8k": {"batch_size": 4, "max_length": 320},
}
COMMON: dict[str, Any] = {"schedule": "linear", "steps": 60, "eval_steps": 30, "dev_examples": 40, "eval_examples": 120}
KEPT = ("forwards", "seconds", "seconds_per_step", "peak_memory_bytes", "examples", "truncated")


def texts(data: Path, source: int) -> Iterator[dict[str, Any]]:
    with (data / "wikitext2" / ("validation.txt", "test.txt")[source]).open(encoding="utf-8") as lines:
        yield from ({"text": line.strip()} for line in lines if len(line.strip()) > 200)


def conversations(data: Path, source: int) -> Iterator[dict[str, Any]]:
    with (data / "gsm8k" / ("train.jsonl", "test.jsonl")[source]).open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            said = (("user", row["question"]), ("assistant", row["answer"]))
            yield {"messages": [{"role": role, "content": content} for role, content in said]}


ROWS = {"wikitext": texts, "gsm8k": conversations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("--rows", choices=list(ROWS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with the folders wikitext2 and gsm8k")
    parser.add_argument("--lr", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int)
    given = parser.parse_args()
    ranks = {} if given.rank is None else {"rank": given.rank}
    settings = {"method_options": {}} | COMMON | SIZES[given.rows] | WAYS[given.way]
    settings["method_options"] = settings["method_options"] | ranks
    with tempfile.TemporaryDirectory() as folder:
        for split, source in (("train", 0), ("validation", 1)):
            lines = (json.dumps(row) + "\n" for row in ROWS[given.rows](given.data, source))
            (Path(folder) / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        out = Path(folder) / "run"
        config = TrainConfig(model="demo", data=folder, out=str(out), lr=float(given.lr), seed=given.seed, **settings)
        summary = train(config, Console())
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["eval_loss"] for line in log if "eval_loss" in line}
    validation = {line["step"]: line["validation_loss"] for line in log if "validation_loss" in line}
    rank, ranked = ("", "") if given.rank is None else (f" --rank {given.rank}", f"-rank{given.rank}")
    way = f"{given.way} --rows {given.rows} --data DATA --lr {given.lr} --seed {given.seed}{rank}"
    facts = {"command": f"python benchmarks/texts.py {way}", "held_out_loss": held_out, "validation_loss": validation}
    facts |= {name: summary[name] for name in KEPT}
    write_json(RESULTS / f"{given.rows}-{given.way}{ranked}-lr{given.lr}-s{given.seed}.json", facts)


if __name__ == "__main__":
    main()
