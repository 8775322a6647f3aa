"""How far AGZO and MeZO are on SST-2's validation rows along the way to 75%.

    python benchmarks/seventy_five.py agzo --data DATA --lr 1.2e-3 --seed 0
    python benchmarks/seventy_five.py mezo --data DATA --lr 3e-5 --seed 0

SmolLM2-135M-Instruct, all 872 validation rows every so many steps; `zoft train` itself looks at them only before and
after. Writes results/seventy_five/METHOD-lrLR-sSEED.json as it goes, with the settings, those of `zoft train`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from zoft.train.assemble import Run, assemble
from zoft.train.config import TrainConfig
from zoft.train.files import write_json

RESULTS = Path(__file__).parent / "results" / "seventy_five"
WAYS: dict[str, dict[str, Any]] = {
    "agzo": {
        "steps": 80,
        "eval_steps": 10,
        # The last 18 of 30 layers, which bear a larger rate, and 64 directions a step, for five forwards.
        "method_options": {"per_example": True, "probes": 4, "include": ["*.layers.1[2-9].*", "*.layers.2?.*"]},
    },
    "mezo": {"steps": 500, "eval_steps": 50},
}


class Watch(TrainerCallback):
    """Evaluates the validation rows whenever the trainer has evaluated its held-out ones."""

    def __init__(self, run: Run, path: Path, facts: dict[str, Any]) -> None:
        self.run, self.path, self.facts = run, path, facts
        self.rows: list[dict[str, Any]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        if "eval_accuracy" not in metrics:
            return  # its own evaluation
        found = self.run.trainer.evaluate(self.run.data["validation"], metric_key_prefix="validation")
        step, forwards = state.global_step, self.run.trainer.zero_order.counters.forwards
        row = {"step": step, "forwards": forwards}
        self.rows.append(row | {name: found[f"validation_{name}"] for name in ("accuracy", "loss")})
        write_json(self.path, self.facts | {"validation": self.rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(WAYS))
    parser.add_argument("--data", type=Path, required=True, help="folder with the folder sst2")
    parser.add_argument("--lr", required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    method, lr, seed, settings = given.method, given.lr, given.seed, WAYS[given.method]
    command = f"python benchmarks/seventy_five.py {method} --data DATA --lr {lr} --seed {seed}"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{method}-lr{lr}-s{seed}.json"
    with tempfile.TemporaryDirectory() as folder:
        own = {"model": "demo", "task": "sst2", "data": str(given.data / "sst2"), "out": folder, "dev_examples": 16}
        config = TrainConfig.load(None, method=method, lr=lr, eps=3e-3, seed=seed, **own, **settings)
        run = assemble(config, Console(quiet=True), False, True)
        run.trainer.add_callback(Watch(run, path, {"command": command, "method": method, **settings}))
        run.trainer.evaluate()
        run.trainer.train()


if __name__ == "__main__":
    main()
