"""What limits a step of 70 billion parameters on 8 nodes, and of 1,000 phones: arithmetic, checked by simulation.

    python benchmarks/scale.py

The first case is here, the second in phones.py. What a node sends is counted on Llama-70B's shapes (sent.py);
`closed_form` says what a step takes, `simulate` plays it, node by node and stage by stage. Writes results/scale.json,
from which `tables` makes the tables of docs/scale.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import phones
from sent import EXAMPLES, FORWARD, OnMeta, sent
from transformers import LlamaConfig

from zoft.optim import AGZO, Guided, MeZO, ZeroOrder, ZOAct
from zoft.train.files import read_json, write_json

NODES, TOKENS = 8, 256  # tokens of an example
SHAPES = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
METHODS: dict[str, Callable[..., ZeroOrder]] = {
    "mezo": partial(MeZO, include=("*.norm.weight",)),  # what is perturbed has no part in what is sent
    "agzo": AGZO,
    "agzo, every 50 steps": partial(AGZO, renew_every=50),
    "zo-act": ZOAct,
    "guided": Guided,
}
DUE = {"agzo": 1.0, "agzo, every 50 steps": 1 / 50}  # share of the steps that are as the first is; of others' none
NODE_JITTER, BLOCK_JITTER, STEPS = 0.02, 0.05, 20
RESULTS = Path(__file__).parent / "results" / "scale.json"


@dataclass(frozen=True)
class Setting:
    """GPUs of a node, their peak FLOP/s (`utilisation` of it is reached) and memory bytes/s, and the nodes' links."""

    name: str
    gpus: int
    flops: float
    utilisation: float
    memory: float
    bits: float  # of a weight
    latency: float  # seconds of a hop
    bandwidth: float  # bytes/s of a node's link, each way
    methods: tuple[str, ...]

    def forward(self, parameters: int, tokens: int) -> float:
        """Seconds of a forward over so many tokens: its products, or reading the weights, whichever takes longer."""
        products = 2 * parameters * tokens / (self.gpus * self.flops * self.utilisation)
        return max(products, parameters * self.bits / 8 / (self.gpus * self.memory))


H100 = {"flops": 989e12, "memory": 3.35e12}  # dense bfloat16 and HBM3, NVIDIA's data sheet of the SXM version
SETTINGS = (
    Setting("8 x 8 GPUs", 8, **H100, utilisation=0.4, bits=16, latency=1e-5, bandwidth=50e9,
            methods=("mezo", "agzo", "agzo, every 50 steps", "zo-act", "guided")),
    Setting("8 x 1 GPU", 1, **H100, utilisation=0.3, bits=4.5, latency=5e-5, bandwidth=1.25e9,
            methods=("zo-act", "guided")),
)  # fmt: skip


# --- what it takes -------------------------------------------------------------------------------------------


def by_ring(size: int, setting: Setting) -> float:
    """Seconds of a sum of `size` bytes over all nodes, an eighth of it at a time around a ring, twice."""
    return 2 * (NODES - 1) * (setting.latency + size / NODES / setting.bandwidth)


def by_doubling(size: int, setting: Setting) -> float:
    """Seconds of it if partners at distances 1, 2 and 4 exchange the whole."""
    return math.log2(NODES) * (setting.latency + size / setting.bandwidth)


def seconds_of(size: int, setting: Setting) -> float:
    """Seconds of it in the way that is faster."""
    return min(by_ring(size, setting), by_doubling(size, setting))


def summed(ready: np.ndarray, size: int, setting: Setting) -> np.ndarray:
    """When each node has the sum, from when each was `ready`: stage by stage, one waits for whom it hears from."""
    nodes, ring = np.arange(NODES), by_ring(size, setting) < by_doubling(size, setting)
    for stage in range(2 * (NODES - 1) if ring else int(math.log2(NODES))):
        other = nodes - 1 if ring else nodes ^ (1 << stage)
        part = size / NODES if ring else size
        ready = np.maximum(ready, ready[other]) + setting.latency + part / setting.bandwidth
    return ready


def pieces(messages: Sequence[int]) -> list[tuple[int, list[int]]]:
    """How many forwards run without a sum, and the sizes of those that cut the last of them into parts, in turn."""
    found: list[tuple[int, list[int]]] = []
    for message in messages:
        if message == FORWARD and (not found or found[-1][1]):
            found.append((1, []))
        elif message == FORWARD:
            found[-1] = (found[-1][0] + 1, [])
        else:
            found[-1][1].append(message)
    return found


def closed_form(messages: Sequence[int], forward: float, setting: Setting, blocks: int) -> float:
    """Seconds of a step: forwards, the wait for the slowest of NODES at each sum, and the sums.

    A node's forward takes 1 + NODE_JITTER n times the mean, each of its blocks (or of the parts between sums) 1 +
    BLOCK_JITTER n times, n standard normal; the largest of NODES n is 1.42 on average.
    """
    grid = np.linspace(-8, 8, 16_001)
    largest = float(np.trapezoid((grid >= 0) - np.vectorize(NormalDist().cdf)(grid) ** NODES, grid))
    total = sum(seconds_of(message, setting) for message in messages if message != FORWARD)
    for forwards, sizes in pieces(messages):
        cut = len(sizes) >= blocks  # else the sums are all at the end
        spread = math.sqrt(forwards * (NODE_JITTER**2 + BLOCK_JITTER**2 / (1 if cut else blocks)))
        total += forward * (forwards + largest * spread)
    return total


def simulate(messages: Sequence[int], forward: float, setting: Setting, blocks: int, steps: int) -> tuple[float, float]:
    """Seconds of a step, and the share of them that a node waits for others, in `steps` steps."""
    random = np.random.default_rng(0)
    now, waited = np.zeros(NODES), 0.0
    for _ in range(steps):
        for forwards, sizes in pieces(messages):
            cut = len(sizes) >= blocks
            node = NODE_JITTER * random.standard_normal((forwards, NODES))
            if not cut:
                block = BLOCK_JITTER * random.standard_normal((forwards, blocks, NODES)).mean(1)
                now = now + forward * (1 + node + block).sum(0)
            for size in sizes:
                if cut:
                    now = now + forward / len(sizes) * (1 + node[0] + BLOCK_JITTER * random.standard_normal(NODES))
                waited += float((now.max() - now).mean())
                now = summed(now, size, setting)
    total = float(now.max())
    return total / steps, waited / total


def nodes() -> dict[str, Any]:
    """The first case: the model, what each method sends, and what a step takes in each setting."""
    model, blocks = OnMeta(LlamaConfig(**SHAPES)), SHAPES["num_hidden_layers"]
    weights = sum(p.numel() for p in model.parameters())
    # Guided's bases come from the positions that the loss reads: one an example.
    counted = {name: sent(make, model, NODES, 1 if make is Guided else TOKENS) for name, make in METHODS.items()}
    sizes = {
        name: {
            when: {"sums": len(messages) - messages.count(FORWARD), "bytes": sum(m for m in messages if m != FORWARD)}
            for when, messages in zip(("first", "later"), steps, strict=True)
        }
        for name, steps in counted.items()
    }
    rows = []
    for setting in SETTINGS:
        forward = setting.forward(weights, EXAMPLES * TOKENS)
        for method in setting.methods:
            first, later = counted[method]
            row = {"forwards": forward * later.count(FORWARD), "sums": 0.0, "closed_form": 0.0, "simulated": 0.0}
            waited = 0.0
            for messages, share in ((first, DUE.get(method, 0.0)), (later, 1 - DUE.get(method, 0.0))):
                if share:
                    seconds, waiting = simulate(messages, forward, setting, blocks, STEPS)
                    row["sums"] += share * sum(seconds_of(m, setting) for m in messages if m != FORWARD)
                    row["closed_form"] += share * closed_form(messages, forward, setting, blocks)
                    row["simulated"] += share * seconds
                    waited += share * seconds * waiting
            rows.append({"setting": setting.name, "method": method} | row | {"waiting": waited / row["simulated"]})
    maps = ZOAct(model).maps
    facts = {"parameters": weights, "d_in": sum(m.d_in for m in maps), "d_out": sum(m.d_out for m in maps)}
    return facts | {"sent": sizes, "steps": rows}


# --- what the document quotes --------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    """The tables of docs/scale.md."""
    lines = ["| what a node sends: bytes, in so many sums | first step | later steps |", "|---|---|---|"]
    for method, steps in results["nodes"]["sent"].items():
        cells = [f"{steps[when]['bytes']:,} bytes in {steps[when]['sums']:,}" for when in ("first", "later")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += [
        "",
        "| | forwards | sums | a step, closed form | simulated | waiting for others |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["nodes"]["steps"]:
        seconds = " | ".join(f"{1e3 * row[name]:.4g} ms" for name in ("forwards", "sums", "closed_form", "simulated"))
        lines.append(f"| {row['setting']}, {row['method']} | {seconds} | {row['waiting']:.1%} |")
    return "\n".join([*lines, "", *phones.tables(results["phones"])])


def main() -> None:
    write_json(RESULTS, {"nodes": nodes(), "phones": phones.phones()})
    print(tables(read_json(RESULTS)))


if __name__ == "__main__":
    main()
