"""Guided with and without the way through attention, on the user's own texts and conversations.

    python benchmarks/texts.py --data DATA

SmolLM2-135M-Instruct, one seed, 60 steps each, by `zoft train` as a user would: the lines of WikiText-2 of more than
200 characters as `text` (64 tokens of each, batches of 8), and GSM8K's rows as conversations (up to 320 tokens, batches
of 4). Writes results/texts/DATA-with.json and DATA-without.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoft.train.files import write_json

RESULTS = Path(__file__).parent / "results" / "texts"
SIZES = {"wikitext": ("--batch-size", "8", "--max-length", "64"), "gsm8k": ("--batch-size", "4", "--max-length", "320")}
COMMON = ("--method", "guided", "--lr", "1e-3", "--schedule", "linear", "--eval-steps", "30")
ROWS_READ = ("--dev-examples", "40", "--eval-examples", "120")
VARIANTS = {"without": "attention=false", "with": "attention=true"}
KEPT = ("method", "seed", "steps", "forwards", "metric", "seconds", "seconds_per_step", "examples", "truncated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the folders wikitext2 and gsm8k")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    for name, sizes in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder)
            for split, source in (("train", 0), ("validation", 1)):
                lines = (json.dumps(row) + "\n" for row in ROWS[name](given.data, source))
                (rows / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            for variant, option in VARIANTS.items():
                out = rows / variant
                command = [
                    "train",
                    "demo",
                    "--data",
                    folder,
                    *COMMON,
                    *sizes,
                    "--steps",
                    str(given.steps),
                    "-o",
                    option,
                ]
                subprocess.run([sys.executable, "-m", "zoft", *command, "--out", str(out)], check=True)
                write_json(RESULTS / f"{name}-{variant}.json", record(out, name, option))


def texts(data: Path, source: int) -> Iterator[dict[str, Any]]:
    file = data / "wikitext2" / ("validation.txt", "test.txt")[source]
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return ({"text": line} for line in lines if len(line) > 200)


def conversations(data: Path, source: int) -> Iterator[dict[str, Any]]:
    for line in (data / "gsm8k" / ("train.jsonl", "test.jsonl")[source]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        said = (("user", row["question"]), ("assistant", row["answer"]))
        yield {"messages": [{"role": role, "content": content} for role, content in said]}


ROWS = {"wikitext": texts, "gsm8k": conversations}


def record(out: Path, name: str, option: str) -> dict[str, Any]:
    """What a run came to: its losses on held-out rows and on the validation rows, before and after."""
    summary = json.loads((out / "summary.json").read_text())
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_out = [{key: line[key] for key in ("step", "seconds", "eval_loss")} for line in log if "eval_loss" in line]
    validation = [line["validation_loss"] for line in log if "validation_loss" in line]
    kept = {key: summary[key] for key in KEPT}
    return {"data": name, "option": option, **kept, "held_out": held_out, "validation_loss": validation}


if __name__ == "__main__":
    main()
