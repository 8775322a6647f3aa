"""`zoft.bench.step`: who runs when, what is counted, and that the shared model is left bare."""

from itertools import count
from typing import Any

import pytest
import torch

from train.tiny import make_model
from zoft.bench.step import BARE, PUBLISHED, Clock, Step, Timing, forwards, summary, take_turns, training_step
from zoft.data import IGNORE, positions_to_keep
from zoft.errors import UserError
from zoft.train import random_batch

CPU = torch.device("cpu")


def test_all_rows_run_equally_often_and_in_turns() -> None:
    order: list[str] = []

    def row(name: str) -> Step:
        def step(clock: Clock) -> None:
            with clock("forwards"):
                order.append(name)

        return step

    found = take_turns(CPU, {name: row(name) for name in "fab"}, 3)
    assert "".join(order) == "fab" + "abf" + "bfa" + "fab"
    assert all(len(timing.whole) == len(timing.parts) == 3 for timing in found.values())


@pytest.mark.parametrize(
    "method, passes",
    [
        ("agzo", 2),
        ("agzo+rank=2+probe_batching=true", 2),
        ("zo-act", 2),
        ("lozo", 2),
        ("mezo", 2),
        ("aim-zo", 5),
        ("guided", 1),
        (PUBLISHED, 2),
        ("fo-adamw", 1),
    ],
)
def test_forwards_of_a_step(method: str, passes: int) -> None:
    model: Any = make_model()
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    batch = random_batch(model, 4, 6)
    step = training_step(method, model, batch, {"model": "tiny", "dtype": "float32"})
    for _ in range(2):
        clock = Clock(CPU)
        step(clock)
    of_its_own = {PUBLISHED: set(), "fo-adamw": {"backward", "update"}}.get(method, {"update", BARE})
    assert clock.parts.keys() == {"forwards"} | of_its_own and len(clock.parts["forwards"]) == passes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before) == (method in ("zo-act", "guided"))


def test_plain_forwards_read_the_last_position_only() -> None:
    model: Any = make_model()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    clock = Clock(CPU)
    forwards(model, random_batch(model, 4, 6), 2)(clock)
    assert shapes == [(4, 1, model.config.vocab_size)] * 2 and len(clock.parts["forwards"]) == 2


def test_summary() -> None:
    """On a machine whose speed halves: the ratio is the rounds' own."""
    plain = Timing([2.0, 4.0, 4.0], [{"forwards": [t / 2] * 2} for t in (2.0, 4.0, 4.0)])
    parts = [{"forwards": [t], "update": [0.5]} for t in (2.0, 2.0, 8.0)]
    found = summary(plain, Timing([3.0, 3.0, 9.0], parts, forwards=1))
    assert found == {
        "seconds_per_step": 3.0,
        "seconds_two_forwards": 4.0,
        "ratio": 1.5,
        "ratio_quartiles": [1.125, 1.875],
        "forwards_per_step": 1,
        "ratio_own_forwards": 3.0,
        "breakdown": {"forwards": [2.0], "update": 0.5, "rest": 0.5},
    }


def test_a_refusal_names_the_method() -> None:
    model: Any = make_model("opt")
    for layer in model.model.decoder.layers:
        layer.forward = lambda hidden_states, **_: hidden_states  # nothing is added to the stream
    step = training_step("guided", model, random_batch(model, 4, 6), {"model": "tiny"})
    with pytest.raises(UserError, match="method guided: no block"):
        step(Clock(CPU))


def test_random_batch() -> None:
    model: Any = make_model()
    batch = random_batch(model, 3, 7, seed=1)
    assert batch["input_ids"].shape == (3, 7) and bool(batch["attention_mask"].all())
    assert torch.equal(batch["input_ids"], random_batch(model, 3, 7, seed=1)["input_ids"])
    assert not torch.equal(batch["input_ids"], random_batch(model, 3, 7, seed=2)["input_ids"])
    with pytest.raises(UserError, match="the model takes 256 tokens; 257 are too many"):
        random_batch(model, 1, 257)


def test_random_texts_are_learned_from_their_second_token() -> None:
    model: Any = make_model()
    batch = random_batch(model, 3, 7, texts=True)
    assert bool((batch["labels"][:, 0] == IGNORE).all()) and "targets" not in batch
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:]) and positions_to_keep(batch) == 7


def test_what_makes_the_model_bare_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances by one whenever it is read."""
    monkeypatch.setattr("time.perf_counter", count().__next__)

    def step(clock: Clock) -> None:
        for part in ("forwards", BARE):
            with clock(part):
                pass

    timing = take_turns(CPU, {"a": step}, 1)["a"]
    assert timing.parts == [{"forwards": [1]}]
    assert timing.whole == [4]  # of the six readings' five
