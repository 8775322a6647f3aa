"""The guided left factor: the estimate is autograd's gradient without the ways it neglects."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from zoft.optim import Full, Guided, Loss, NoStream, ZeroOrder
from zoft.optim.guided import Guided as GuidedEstimator

from .guidance import (
    BUILDERS,
    FUSED,
    NEGLECTED,
    closure_of,
    detached,
    detached_attention,
    error,
    estimated,
    gradient,
    names,
    stream_of,
)
from .models import changed, llama, snapshot, token_batch


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", BUILDERS)
def test_it_is_the_gradient_but_for_the_way_through_attention_if_that_is_not_asked_for(
    name: str, dtype: torch.dtype, tolerance: float, attention: bool
) -> None:
    """All positions are read, so nothing else is neglected."""
    model = BUILDERS[name]().to(dtype)
    if name == "opt":  # a central difference is not the slope at a kink
        for layer in model.model.decoder.layers:
            layer.activation_fn, tolerance = nn.GELU(), max(tolerance, 1e-3)
    optimizer, closure = Guided(model, rank=64, attention=attention, energy=1.0), closure_of(model, token_batch())
    found = estimated(optimizer, closure)
    optimizer.branches.detach()
    with ExitStack() as stack:
        stack.enter_context(detached(model, NEGLECTED.get(name, ())))
        stack.enter_context(nullcontext() if attention else detached_attention())
        expected = gradient(optimizer, closure)
    stream = stream_of(model)
    within = [m.name for w in stream.writers if w.feed_forward for m in w.feed_forward.inner]
    attended = [w.attention for w in stream.writers if w.attention]
    made = [name for part in attended for name in part.maps] if attention else []
    head = {m.name for m in optimizer.maps} & stream.behind
    assert found.keys() == {*names(stream), *within, *made, *head}
    assert len(attended) == 2 * (name != "openai-gpt") and all(part.queries and part.keys for part in attended)
    assert len(made) == (2 if name in FUSED else 6) * (attention and name != "openai-gpt")
    assert {name: e for name in found if (e := error(found[name], expected[name])) > tolerance} == {}


def test_without_feed_forward_the_stream_is_the_identity() -> None:
    model = llama()
    optimizer, closure = Guided(model, rank=64, feed_forward=False), closure_of(model, token_batch())
    found = estimated(optimizer, closure)
    with detached(model, ("self_attn", "mlp")):
        expected = gradient(optimizer, closure)
    assert found.keys() == set(names(stream_of(model)))
    assert all(error(found[name], expected[name]) < 1e-3 for name in found)


@pytest.mark.parametrize("into", ["weights", "coefficients"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "granite"])
def test_two_passes_keep_nothing_and_find_the_same(name: str, into: str) -> None:
    """The second pass takes what the first one has kept, and the basis may come from the first."""
    model = BUILDERS[name]()
    closure = closure_of(model, token_batch())
    options = {"rank": 8, "into": into, "feed_forward": False}
    one, two = (Guided(model, **options, two_pass=passes) for passes in (False, True))
    expected, found = estimated(one, closure), estimated(two, closure)
    assert found.keys() == expected.keys() and (one.counters.forwards, two.counters.forwards) == (1, 2)
    for factor in found:
        torch.testing.assert_close(found[factor], expected[factor], rtol=1e-4, atol=1e-7)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) or into == "coefficients"


@pytest.mark.parametrize("options", [{}, {"feed_forward": False, "attention": True}])
def test_two_passes_cannot_go_through_the_blocks(options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="feed_forward=False, and leave attention out"):
        Guided(llama(), two_pass=True, **options)


def test_two_passes_have_one_error_for_all() -> None:
    model = BUILDERS["bart"]()
    with pytest.raises(NoStream, match="blocks normalise the stream: leave two_pass out"):
        Guided(model, two_pass=True, feed_forward=False).step(closure_of(model, token_batch()))


def test_coefficients_already_trained_are_part_of_the_way_back() -> None:
    model = llama()
    optimizer, closure = Guided(model, rank=64, lr=0.01, attention=True, energy=1.0), closure_of(model, token_batch())
    for _ in range(3):
        optimizer.step(closure)
    assert max(float(c.abs().max()) for c in optimizer.coefficients.values()) > 0.01
    found = estimated(optimizer, closure)
    expected = gradient(optimizer, closure)  # the side branches are in the model
    assert all(error(found[name], expected[name]) < 1e-3 for name in found)


@pytest.mark.parametrize("name", BUILDERS)
def test_where_few_rows_are_read_nothing_within_feed_forward_parts_is_computed_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the estimate is the same."""
    model, calls = BUILDERS[name](), []
    closure, optimizer = closure_of(model, token_batch(), logits_to_keep=3), Guided(model, rank=8)
    estimated(optimizer, closure)  # the stream and the bases are there
    inner = [m.modules[0] for w in stream_of(model).writers if w.feed_forward for m in w.feed_forward.inner]
    for module in inner:
        module.register_forward_hook(lambda *_: calls.append(1))
    few, called = estimated(optimizer, closure), len(calls)
    assert called == len(inner)
    monkeypatch.setattr("zoft.optim.kept.FEW", 0)
    many = estimated(optimizer, closure)
    assert len(calls) - called == 2 * len(inner)
    for factor in many:
        torch.testing.assert_close(few[factor], many[factor], rtol=1e-4, atol=1e-7)


def test_values_that_are_not_trained_are_gone_through_all_the_same() -> None:
    model = llama()
    closure, frozen = closure_of(model, token_batch()), ("lm_head", "*.v_proj")
    whole = estimated(optimizer := Guided(model, rank=64, attention=True, energy=1.0), closure)
    optimizer.branches.detach()
    part = estimated(Guided(model, rank=64, attention=True, energy=1.0, exclude=frozen), closure)
    assert whole.keys() - part.keys() == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}
    for name in part:
        torch.testing.assert_close(part[name], whole[name])


@pytest.mark.parametrize("name", BUILDERS)
def test_under_autocast_it_is_the_same_but_for_rounding(name: str) -> None:
    """It once took dtypes that do not fit together from what it had seen there."""
    model = BUILDERS[name]()
    closure, optimizer = closure_of(model, token_batch()), Guided(model, rank=64, attention=True, energy=1.0)
    whole = estimated(optimizer, closure)
    optimizer.branches.detach()
    found, dtypes = stream_of(model), []
    for module in {layer for w in found.writers if w.attention for layer in w.attention.values.map.modules}:
        module.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))

    def halved() -> Loss:
        with torch.autocast("cpu", torch.bfloat16):
            return closure()

    half = estimated(Guided(model, rank=64, attention=True, energy=1.0), halved)
    assert half.keys() == whole.keys()
    assert {name: e for name in half if (e := error(half[name], whole[name])) > 0.05} == {}
    assert dtypes.count(torch.bfloat16) == (6 if dtypes else 0)  # two blocks: to find the stream, forwards, and again
    assert bool(dtypes) == (name != "openai-gpt")  # which computes attention itself


@pytest.mark.parametrize("attention", [True, False])
def test_autocast_around_the_estimate_leaves_its_factors_in_float32(attention: bool) -> None:
    """Once they were rounded to bfloat16, and Adam's moments with them."""
    model = llama()
    closure, optimizer = closure_of(model, token_batch()), Guided(model, rank=8, attention=attention)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.estimate(closure)
        estimate = optimizer.take_estimate()
    assert estimate is not None and {factor.dtype for factor in estimate.factors.values()} == {torch.float32}


def test_only_what_the_loss_reads_is_read() -> None:
    """With the final logits only, and padding on the left, the estimate is that of all logits."""
    batch = token_batch()
    batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    batch["labels"][:, :-2] = -100
    estimates = []
    for options in ({}, {"logits_to_keep": 3}):
        model = llama()
        optimizer = Guided(model, rank=64)
        estimates.append(estimated(optimizer, closure_of(model, batch, **options)))
    whole, part = estimates
    for name in whole:
        torch.testing.assert_close(part[name], whole[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("feed_forward", [True, False])
@pytest.mark.parametrize("attention", [True, False])
def test_what_it_does_not_reach_has_no_coefficients(feed_forward: bool, attention: bool) -> None:
    model = llama()
    optimizer = Guided(model, rank=4, feed_forward=feed_forward, attention=attention)
    optimizer.step(closure_of(model, token_batch()))
    ends = {"o_proj", "down_proj"} | ({"gate_proj", "up_proj"} if feed_forward else set())
    ends |= {"q_proj", "k_proj", "v_proj"} if attention else set()
    assert {name.rpartition(".")[2] for name in optimizer.coefficients} == ends
    assert optimizer.bases.keys() == optimizer.coefficients.keys()
    assert {m.name for m in optimizer.branches.active} == optimizer.coefficients.keys()


def test_it_says_so_if_it_reaches_nothing() -> None:
    """Once it went on, and moved nothing."""
    model, batch = llama(), token_batch()
    with pytest.raises(NoStream, match=r"none of the layers to be trained, such as 'model.layers.0.self_attn.q_proj'"):
        Guided(model, include=("*.q_proj",)).estimate(closure_of(model, batch))


def test_dense_directions_are_refused() -> None:
    """Once a Full() subspace ended in StopIteration, and other parameters were said to move and stayed."""
    with pytest.raises(ValueError, match="no Full"):
        ZeroOrder(llama(), lr=1e-3, subspace=Full(), estimator=GuidedEstimator())
    with pytest.raises(ValueError, match="others='frozen'"):
        Guided(llama(), into="weights", others="gaussian")


def test_nothing_is_differentiated() -> None:
    """It runs where autograd cannot, and leaves the model as it was."""
    model = llama()
    before = snapshot(model)
    optimizer, closure = Guided(model, rank=4), closure_of(model, token_batch())
    with torch.inference_mode():
        optimizer.estimate(closure)
        optimizer.step()
    assert changed(model, before) == set()
    assert any(float(c.abs().max()) > 0 for c in optimizer.coefficients.values())


def test_one_forward_a_step_and_one_to_find_the_stream_that_does_not_count() -> None:
    model, calls = llama(), []
    optimizer = Guided(model, rank=4)
    model.register_forward_hook(lambda *_: calls.append(optimizer.counters.steps))
    for seed in range(3):
        optimizer.step(closure_of(model, token_batch(seed=seed)))
    assert calls == [0, 0, 1, 2] and optimizer.counters.forwards == 3


@pytest.mark.parametrize("into", ["weights", "coefficients"])
@pytest.mark.parametrize("make", [llama, partial(llama, tie_word_embeddings=True)])
def test_it_learns_with_few_forwards(make: Callable[[], PreTrainedModel], into: str) -> None:
    model, batch = make(), token_batch()
    batch["labels"] = torch.where(batch["labels"] < 0, -100, 7)
    optimizer, closure = Guided(model, lr=0.01, rank=8, into=into), closure_of(model, batch)
    start = optimizer.step(closure)
    for _ in range(20):
        end = optimizer.step(closure)
    assert start is not None and end is not None and end < 0.5 * start


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_feed_forward_parts_are_gone_through_some_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoft.optim.kept.FEW", 0)
    model, found = BUILDERS[name](), []
    for rows in (512, 3):
        monkeypatch.setattr("zoft.optim.way_back.ROWS", rows)
        found.append(estimated(Guided(model, rank=64), closure_of(model, token_batch())))
    assert {name: e for name in found[0] if (e := error(found[1][name], found[0][name])) > 1e-4} == {}


@pytest.mark.parametrize("joined", [1, 1 << 10, 1 << 23])
def test_the_slope_may_come_whole_or_in_parts(joined: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other tokens than the logits' it is refused."""
    monkeypatch.setattr("zoft.optim.way_back.JOINED", joined)
    monkeypatch.setattr("zoft.optim.loss.LARGE", 1)
    found = []
    for of in (lambda parts: parts, lambda parts: torch.cat(list(parts), 1)):
        model = llama()
        optimizer, closure = Guided(model), closure_of(model, token_batch())
        optimizer.step(lambda of=of, closure=closure: (loss := closure())._replace(error=lambda: of(loss.error())))
        found.append(optimizer.coefficients)
    assert found[0] and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with pytest.raises(ValueError, match=r"that of \(8, 9\) tokens, which is not the logits'"):
        optimizer.step(lambda: closure()._replace(error=lambda: torch.zeros(8, 9, 64)))


def test_a_loss_that_is_not_finite_is_skipped() -> None:
    model = llama()
    optimizer, closure = Guided(model), closure_of(model, token_batch())
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(lambda: Loss(closure().values * torch.nan, closure().error))
    assert optimizer.counters.skipped == 1 and not optimizer.coefficients


def test_a_model_whose_output_is_not_finite_is_looked_at_again_later() -> None:
    """Once a traceback: least squares of what is not finite."""
    model = llama()
    weight = model.model.layers[1].mlp.down_proj.weight
    good = weight.detach().clone()
    optimizer, closure = Guided(model, rank=4), closure_of(model, token_batch())
    weight.data.fill_(torch.nan)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(closure)
    assert optimizer.counters.skipped == 1 and not optimizer.coefficients
    weight.data.copy_(good)
    optimizer.step(closure)
    assert optimizer.counters.skipped == 1 and optimizer.coefficients
