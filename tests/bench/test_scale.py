"""The arithmetic of docs/scale.md, in small."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from forks import spawn
from scripts import ROOT, load
from zoft.optim import Guided, Loss, cross_entropy
from zoft.train.files import read_json

SCALE = load("benchmarks/scale.py")
PHONES, TOKENS, READ = SCALE.phones, 7, 2  # of an example, and whose logits are read by guided
TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40,
}  # fmt: skip


def process(rank: int, count: int, folder: str) -> None:
    """One of `count` processes: what each method really sends in its first step and in its second."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    found = {}
    for name, make in SCALE.METHODS.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
        optimizer = make(model, lr=1e-3)
        ids = torch.randint(40, (SCALE.EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(rank))
        kept = READ if make is Guided else TOKENS

        def closure(model: Any = model, ids: Any = ids, kept: int = kept) -> Loss:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
            parts = zip(logits.split(1), ids.split(1), strict=True)
            return Loss(torch.stack([cross_entropy(*part).values for part in parts]), cross_entropy(logits, ids).error)

        sent = [0]
        for _ in range(2):
            optimizer.step(closure)
            sent.append(optimizer.ranks.sent)
        found[name] = [sent[1], sent[2] - sent[1]]
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_what_is_counted_is_what_two_processes_send(tmp_path: Path) -> None:
    spawn(process, (2, str(tmp_path)), nprocs=2)
    real = json.loads((tmp_path / "0.json").read_text())
    model = SCALE.OnMeta(LlamaConfig(**TINY))
    for name, make in SCALE.METHODS.items():
        steps = SCALE.sent(make, model, 2, READ if make is Guided else TOKENS)
        counted = [sum(m for m in messages if m != SCALE.FORWARD) for messages in steps]
        assert counted == real[name], name
        assert steps[1].count(SCALE.FORWARD) == (1 if make is Guided else 2)


@pytest.mark.parametrize("size", [8, 100_000_000])
def test_sums_take_what_the_formula_says(size: int) -> None:
    setting = SCALE.SETTINGS[0]
    ready = np.zeros(SCALE.NODES)
    ready[3] = 5.0  # all wait for the last one
    assert SCALE.summed(ready, size, setting) == pytest.approx(5 + SCALE.seconds_of(size, setting))
    ring, doubling = SCALE.by_ring(size, setting), SCALE.by_doubling(size, setting)
    assert (ring < doubling) == (size > 1000)


@pytest.mark.parametrize("inner", [0, 40])
def test_the_closed_form_is_what_is_simulated(inner: int) -> None:
    """With sums that cut a forward, and with none."""
    setting, forward = SCALE.SETTINGS[0], 0.02
    messages = [SCALE.FORWARD, *inner * [32_768], SCALE.FORWARD, 24]
    found, waiting = SCALE.simulate(messages, forward, setting, 20, 300)
    expected = SCALE.closed_form(messages, forward, setting, 20)
    assert found == pytest.approx(expected, rel=0.003)
    sums = sum(SCALE.seconds_of(m, setting) for m in messages if m != SCALE.FORWARD)
    assert waiting * found == pytest.approx(expected - sums - 2 * forward, rel=0.1)  # nothing else is waited for


def test_a_forward_takes_its_products_or_its_weights() -> None:
    setting = SCALE.SETTINGS[0]
    assert setting.forward(10**9, 10_000) == pytest.approx(2e13 / (8 * 0.4 * 989e12))
    assert setting.forward(10**9, 1) == pytest.approx(2e9 / (8 * 3.35e12))


@pytest.mark.parametrize("own", [True, False])
def test_an_estimate_is_as_large_as_the_formula_says(own: bool) -> None:
    facts = PHONES.signal(PHONES.World(), own, 30, 400)
    assert facts["found"] == pytest.approx(facts["formula"], rel=0.03 if own else 0.15)


@pytest.mark.parametrize("own", [True, False])
def test_a_phone_that_was_away_ends_as_the_others(own: bool) -> None:
    facts = PHONES.catch_up(PHONES.World(), own, 5, away=(2, 6), rounds=8)
    assert facts["same_bits"]
    assert facts["bytes_missed"] == 4 * facts["bytes_a_round"] == 4 * (31 + 8 * (5 if own else 1))
    assert facts["elsewhere_differs_after"] <= 8
    assert 0 < facts["elsewhere_off"] < 1e-5


def test_clipping_bounds_what_liars_do() -> None:
    ways = ((0, False), (10, False), (10, True))
    honest, lied, clipped = (PHONES.poisoned(PHONES.World(), 100, *way, rounds=8) for way in ways)
    assert lied > 2 * honest
    assert clipped == pytest.approx(honest, rel=0.05)


def test_deadlines() -> None:
    facts = PHONES.deadline(10.0, rounds=100)
    assert facts["formula"] == pytest.approx(400)
    assert facts["heard"] == pytest.approx(400, rel=0.01)


def test_the_document_quotes_the_results() -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    lines = SCALE.tables(read_json(SCALE.RESULTS)).splitlines()
    assert [line for line in lines if line not in text] == []
    assert sum(line.startswith("| ") for line in lines) > 20
