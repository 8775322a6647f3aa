"""Guided through attention: to all tokens, each block run again, from the start or after so many steps."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft.optim import EstimateWarning, Guided, Loss
from zoft.optim.attention import Pattern, attended
from zoft.optim.kept import NotRepeatable

from .guidance import closure_of, detached, error, estimated, gradient
from .models import llama, token_batch


def test_attention_after_so_many_steps_is_gone_through_at_first_and_then() -> None:
    """The first step shows whether blocks can run again; the moments of the steps without it are not those with it."""
    model = llama()
    closure = closure_of(model, token_batch())
    optimizer, always, never = (
        Guided(model, rank=8, lr=0.0, **options)
        for options in ({"attention": True, "attention_after": 3}, {"attention": True}, {})
    )
    expected = estimated(always, closure)
    estimated(never, closure)
    never.set_bases({name: always.bases[name] for name in never.bases})
    without = estimated(never, closure)
    for step, there in enumerate((expected, without, without, expected, expected)):
        optimizer.estimate(closure)
        assert optimizer._estimate is not None
        found = {name: factor @ optimizer.bases[name].t() for name, factor in optimizer._estimate.factors.items()}
        assert found.keys() == there.keys()
        for name, product in found.items():
            torch.testing.assert_close(product, there[name])
        optimizer.step()
        assert {int(state["steps"]) for state in optimizer.updates.values()} == [{1}, {1, 2}, {1, 3}, {1}, {2}][step]
        assert optimizer.counters.forwards == [2, 3, 4, 6, 8][step]  # blocks that run again make a second one


@pytest.mark.parametrize("options", [{"attention_after": 3}, {"attention": True, "attention_after": -1}])
def test_attention_after_is_a_number_of_steps(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attention_after is a number of steps"):
        Guided(llama(), **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_through_attention_the_error_goes_to_tokens_whose_logits_the_loss_does_not_read(side: str) -> None:
    model, batch = llama(), token_batch()
    if side == "left":  # where the padding is; then final tokens are read of all examples, else of the longest alone
        batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    batch["labels"][:, :-3] = -100
    optimizer, closure = Guided(model, rank=64, attention=True, energy=1.0), closure_of(model, batch, logits_to_keep=4)
    found = estimated(optimizer, closure)
    expected = gradient(optimizer, closure)
    assert any("v_proj" in name for name in found)
    assert {name: e for name in found if (e := error(found[name], expected[name])) > 1e-3} == {}


def test_where_attention_cannot_be_gone_through_no_block_runs_again() -> None:
    """Once all of them did, to no end: models without attention, or with another implementation of it."""
    model = llama()
    model.set_attn_implementation("eager")
    closure, optimizer, plain = closure_of(model, token_batch()), Guided(model, attention=True), Guided(model)
    estimated(optimizer, closure)
    estimated(plain, closure)
    plain.set_bases({name: optimizer.bases[name] for name in plain.bases})
    found, expected = estimated(optimizer, closure), estimated(plain, closure)
    assert found.keys() == expected.keys()
    for name, product in found.items():
        torch.testing.assert_close(product, expected[name])
    assert optimizer.counters.forwards == 2, "one an estimate"


def test_attention_weights_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    closure, optimizer = closure_of(model, token_batch()), Guided(model, rank=8, attention=True)
    whole = estimated(optimizer, closure)
    monkeypatch.setattr("zoft.optim.attention.LARGE", 1)
    parts = estimated(optimizer, closure)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_queries_that_come_by_in_another_way_are_left_as_they_are() -> None:
    """The error goes through keys and values alone."""
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj, nn.Tanh())
    optimizer, closure = Guided(model, rank=64, attention=True, energy=1.0), closure_of(model, token_batch())
    found = estimated(optimizer, closure)
    with detached(model, ("q_proj",)):
        expected = gradient(optimizer, closure)
    assert not any("q_proj" in name for name in found) and len(found) == 2 * 6
    assert {name: e for name in found if (e := error(found[name], expected[name])) > 1e-3} == {}


def test_it_does_not_matter_whether_the_model_hands_on_shared_keys_once_or_for_each_head() -> None:
    """transformers repeats them where there is a mask: once a batch without padding ended the run."""
    model, batch = llama(), token_batch()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    whole = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    for looked_at, read in ((batch, whole), (whole, batch)):
        optimizer = Guided(model, rank=64, attention=True, energy=1.0)
        estimated(optimizer, closure_of(model, looked_at))
        optimizer.set_bases({m.name: torch.eye(m.d_in) for m in optimizer.maps if m.name in optimizer.bases})
        found = estimated(optimizer, closure_of(model, read))
        optimizer.branches.detach()
        expected = gradient(optimizer, closure_of(model, read))
        assert {name: e for name in found if (e := error(found[name], expected[name])) > 1e-3} == {}


@dataclass
class InParts:
    """A closure of one loss per example, with its batch in parts of so many examples."""

    model: nn.Module
    batch: dict[str, Tensor]
    each: int
    tokens: int = 0
    asked: list[int] = field(default_factory=list)

    def __call__(self) -> Loss:
        return closure_of(self.model, self.batch)()

    def divide(self, number: int) -> list[InParts]:
        self.asked.append(number)
        parts = zip(*(tensor.split(self.each) for tensor in self.batch.values()), strict=True)
        return [InParts(self.model, dict(zip(self.batch, part, strict=True)), self.each) for part in parts]


@pytest.mark.parametrize("each", [1, 2])
def test_a_batch_that_goes_through_attention_in_parts_gives_the_same_estimate(each: int) -> None:
    """And counts as one; the first step takes one pass more, for the bases of the whole batch."""
    model, batch = llama(), {name: tensor.flip(1) for name, tensor in token_batch(4).items()}  # padded on the left
    batch["labels"][:, :-3] = -100  # as many to learn from in each: the mean over the tokens is one over examples
    whole, closure = Guided(model, rank=8, attention=True, energy=1.0), InParts(model, batch, each)
    expected = estimated(whole, closure_of(model, batch))
    parts = Guided(model, rank=8, attention=True, energy=1.0)
    for step, forwards in enumerate((3, 5)):
        loss, found = parts.estimate(closure), parts.take_estimate()
        assert found is not None and found.factors.keys() == whole.coefficients.keys()
        for name, factor in found.factors.items():
            torch.testing.assert_close(factor @ parts.bases[name].t(), expected[name])
        torch.testing.assert_close(loss, closure().values.detach())
        assert parts.counters.forwards == forwards, step


def test_a_batch_goes_through_attention_in_parts_where_it_would_hold_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a 64th of the weights; in an eighth as many as blocks, but each of 512 tokens or more."""
    model = llama(num_hidden_layers=17)
    weights, token_bytes = sum(p.nbytes for p in model.parameters()), 4 * model.config.hidden_size
    tokens = weights // (64 * 17 * token_bytes)
    optimizer, batch, asked = Guided(model, rank=8, attention=True), token_batch(4), []
    for number in (500, 1023, 1024, 9000):
        estimated(optimizer, InParts(model, batch, 4, number, asked))
    monkeypatch.setattr("zoft.optim.guided.LEAST", 1)
    for number in (tokens, tokens + 1):
        estimated(optimizer, InParts(model, batch, 4, number, asked))
    assert asked == [1, 1, 2, 3, 1, 3]


def test_a_part_whose_loss_is_not_finite_leaves_no_estimate() -> None:
    model, batch = llama(), token_batch(4)
    closure, optimizer = InParts(model, batch, 1), Guided(model, rank=8, attention=True)
    estimated(optimizer, closure)
    token, others = batch["input_ids"][3, 0], batch["input_ids"][:3]
    others[others == token] = 0  # so that it is in the last part alone
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    with pytest.warns(EstimateWarning, match="not finite"):
        optimizer.estimate(closure)
    estimate = optimizer.take_estimate()
    assert optimizer.counters.skipped == 1 and estimate is not None and estimate.count == 0


def test_attention_that_is_computed_otherwise_is_not_gone_through() -> None:
    model = llama(attn_implementation="eager")
    closure, none = closure_of(model, token_batch()), Guided(llama(), rank=8)
    found = estimated(Guided(model, rank=8, attention=True), closure)
    assert found.keys() == estimated(none, closure_of(none.model, token_batch())).keys()


def test_what_the_way_through_attention_takes_is_kept_of_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys of all blocks were a fifth of the memory of texts. What was kept is let go block by block."""
    model, alive, counts = llama(num_hidden_layers=4), weakref.WeakSet(), []
    closure, optimizer = closure_of(model, token_batch()), Guided(model, rank=8, attention=True)
    estimated(optimizer, closure)  # the stream and the bases are there
    pattern_of = Pattern.of

    def counted(*args: Any) -> Any:
        counts.append(len(alive))
        found = pattern_of(*args)
        alive.add(found)
        return found

    monkeypatch.setattr(Pattern, "of", counted)
    estimated(optimizer, closure)
    assert counts == [0] * 4 and len(alive) == 0


@pytest.mark.parametrize("through", ["dropout", "memory"])
def test_a_block_that_gives_something_else_when_run_again_is_told_of(through: str) -> None:
    model = llama()
    closure, optimizer, block = (
        closure_of(model, token_batch()),
        Guided(model, attention=True),
        model.model.layers[1],
    )
    optimizer.estimate(closure)
    if through == "dropout":
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train()
    else:
        runs = count()
        block.register_forward_hook(lambda module, args, output: output * (1 + next(runs)))
    with pytest.raises(NotRepeatable, match=r"LlamaDecoderLayer .* eval mode .* leave attention out"):
        optimizer.estimate(closure)


def test_what_padding_becomes_does_not_matter_when_blocks_run_again() -> None:
    model, batch = llama(), token_batch()
    optimizer, closure = Guided(model, rank=8, attention=True), closure_of(model, batch)
    expected = estimated(optimizer, closure)
    padding = batch["attention_mask"].unsqueeze(2) == 0
    model.model.layers[-1].register_forward_hook(lambda module, args, output: output.masked_fill(padding, torch.nan))
    found = estimated(optimizer, closure)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_attention_is_seen_only_while_it_is_looked_at() -> None:
    before, calls = F.scaled_dot_product_attention, []
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ZeroDivisionError), attended(calls.append):
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
        raise ZeroDivisionError
    assert len(calls) == 1 and calls[0].causal and calls[0].scale == 0.5
    assert F.scaled_dot_product_attention is before
