"""Error of finite differences against eps, per method: from it comes the eps of benchmarks/accuracy.yaml.

    python benchmarks/eps.py --data DATA/sst2

SmolLM2-135M-Instruct in bfloat16, against the gradient of a float32 copy, SST-2, batches of 16. Prints a table and
writes results/eps.json: the error of the projected gradient, relative to its size, and for each method the eps whose
error is least with the number of sides that the method uses.
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import partial
from pathlib import Path

from zoft.bench import finite_difference_errors
from zoft.data import load_rows, load_task, sample
from zoft.optim import METHODS
from zoft.train import load_model, task_batches, task_closures

RESULT = Path(__file__).parent / "results" / "eps.json"
DISTANCES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SIDES = {"agzo": "one-sided", "zo-act": "one-sided", "lozo": "two-sided", "mezo": "two-sided"}
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--directions", type=int, default=12)
    args = parser.parse_args()
    task = load_task("sst2")
    model, tokenizer = load_model("demo", dtype="bfloat16")
    exact = copy.deepcopy(model).float()
    rows = sample(load_rows(task, args.data, "train"), 3 * BATCH, 0)
    batches = task_batches(model, tokenizer, task, rows, BATCH)
    closures = list(zip(task_closures(model, batches), task_closures(exact, batches), strict=True))
    result = {}
    print("| method | rms slope | sides |", *(f"{eps:g} |" for eps in DISTANCES), "best |")
    print("|---|---|---|" + "---|" * (len(DISTANCES) + 1))
    for method, own in SIDES.items():
        make = partial(METHODS[method], lr=0.0)
        errors = finite_difference_errors(model, exact, closures, make, DISTANCES, args.directions)
        (size,) = errors.pop("slope")
        relative = {sides: [error / size for error in values] for sides, values in errors.items()}
        best = DISTANCES[relative[own].index(min(relative[own]))]
        result[method] = {"rms_slope": size, "eps": list(DISTANCES), **relative, "uses": own, "best_eps": best}
        for sides, values in relative.items():
            chosen = f"{best:g}" if sides == own else ""
            print(
                f"| {method} | {size:.3g} | {sides} |", *(f"{value:.2f} |" for value in values), chosen, "|", flush=True
            )
    RESULT.write_text(json.dumps({"directions": args.directions, "methods": result}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
