"""The guided left factor: the stream is found, and the estimate is autograd's gradient without the ways it neglects."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    GPTNeoXConfig,
    GraniteConfig,
    MixtralConfig,
    Olmo2Config,
    PhiConfig,
    PreTrainedModel,
)

from zoft.optim import Guided, Loss, cross_entropy
from zoft.optim.attention import attended
from zoft.optim.stream import NoStream, Stream, find_stream
from zoft.optim.transpose import Norm, slope_of

from .models import ARCHITECTURES, GROUPED, SIZES, build, changed, llama, mlp, snapshot, token_batch

GRANITE = {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.5}
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: make for name, (make, _) in ARCHITECTURES.items()},
    "granite": lambda: build(GraniteConfig(**GROUPED, **GRANITE)),
    "olmo2": lambda: build(Olmo2Config(**GROUPED)),
    "gpt-neox": lambda: build(GPTNeoXConfig(**SIZES, intermediate_size=48, tie_word_embeddings=False)),
    "gpt-neox sequential": lambda: build(GPTNeoXConfig(**SIZES, intermediate_size=48, use_parallel_residual=False)),
    "cohere": lambda: build(CohereConfig(**GROUPED, logit_scale=0.25)),
    "phi": lambda: build(PhiConfig(**SIZES, intermediate_size=48)),
    "mixtral": lambda: build(MixtralConfig(**GROUPED, num_local_experts=2)),
}


def closure_of(model: nn.Module, batch: dict[str, Tensor], **options: int) -> Callable[[], Loss]:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return lambda: cross_entropy(model(**inputs, **options).logits, batch["labels"])


def stream_of(model: nn.Module) -> Stream:
    with torch.no_grad():
        found = find_stream(model, closure_of(model, token_batch()))
    assert found is not None
    return found


def names(stream: Stream) -> list[str]:
    return [writer.map.name for block in stream.blocks for writer in block.writers]


@contextmanager
def detached(model: nn.Module, kinds: tuple[str, ...]) -> Iterator[None]:
    """While open, no gradient flows to what modules of these names were called with."""

    def cut(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        def detach(value: object) -> object:
            return value.detach() if isinstance(value, Tensor) else value

        return tuple(detach(a) for a in args), {k: detach(v) for k, v in kwargs.items()}

    inner = [m for name, m in model.named_modules() if name.rpartition(".")[2] in kinds]
    assert inner
    handles = [m.register_forward_pre_hook(cut, with_kwargs=True) for m in inner]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def fixed_pattern(values: bool = True) -> Iterator[None]:
    """While open, no gradient flows through queries and keys; nor, unless `values`, through the values."""
    attention = F.scaled_dot_product_attention

    def fixed(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
        value = value if values else value.detach()
        return attention(query.detach(), key.detach(), value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", fixed)
        yield


@contextmanager
def only_final_rows(model: PreTrainedModel, count: int) -> Iterator[None]:
    """While open, no gradient flows from a block to the one before, but at the final `count` positions."""

    def cut(module: nn.Module, args: tuple) -> tuple:
        return torch.cat((args[0][:, :-count].detach(), args[0][:, -count:]), dim=1), *args[1:]

    handles = [layer.register_forward_pre_hook(cut) for layer in model.model.layers]
    yield
    for handle in handles:
        handle.remove()


def gradient(optimizer: Guided, closure: Callable[[], Loss]) -> dict[str, Tensor]:
    """What autograd says of the optimizer's maps, [d_out, d_in]."""
    weights = [m.weight for m in optimizer.maps]
    found = torch.autograd.grad(closure().values.float(), weights, allow_unused=True)
    pairs = zip(optimizer.maps, found, strict=True)
    return {m.name: (g.t() if m.transposed else g).float() for m, g in pairs if g is not None}


def estimated(optimizer: Guided, closure: Callable[[], Loss]) -> dict[str, Tensor]:
    optimizer.estimate(closure)
    estimate = optimizer.take_estimate()
    assert estimate is not None
    return {name: factor @ optimizer.bases[name].t() for name, factor in estimate.factors.items()}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- the stream --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_writers_are_found(name: str, dtype: torch.dtype) -> None:
    stream = stream_of(BUILDERS[name]().to(dtype))
    ends = {
        "opt": ("out_proj", "fc2"),
        "gpt2": ("c_proj", "c_proj"),
        "gpt-neox": ("dense", "dense_4h_to_h"),
        "gpt-neox sequential": ("dense", "dense_4h_to_h"),
        "phi": ("dense", "fc2"),
        "mixtral": ("o_proj",),  # experts are called with rows of their own
    }.get(name, ("o_proj", "down_proj"))
    assert [n.rpartition(".")[2] for n in names(stream)] == [*ends, *ends]
    gain = 0.3 if name == "granite" else 1.0
    for block in stream.blocks:
        for writer in block.writers:
            assert writer.gain == pytest.approx(gain, rel=0.02)
            assert (writer.norm is not None) == (name in ("gemma3", "olmo2"))
        assert [w.feed_forward is not None for w in block.writers] == [False, True][: len(ends)]
    assert [block.parallel for block in stream.blocks] == [name in ("gpt-neox", "cohere", "phi")] * 2
    assert stream.scale == pytest.approx({"granite": 0.25, "cohere": 0.25}.get(name, 1.0), rel=0.01)


@pytest.mark.parametrize("small", ["down_proj", "o_proj"])
def test_a_writer_that_adds_next_to_nothing_is_found(small: str) -> None:
    """Once its block was taken for one without writers: least squares chose by the share of what is added."""
    model = llama()
    for name, parameter in model.named_parameters():
        if small in name:
            parameter.data *= 1e-3
    assert [n.rpartition(".")[2] for n in names(stream_of(model))] == ["o_proj", "down_proj"] * 2


def test_a_model_without_a_stream_says_what_is_missing() -> None:
    model, x = mlp(), torch.randn(6, 10)
    with pytest.raises(NoStream, match="norm"):
        find_stream(model, lambda: model(x))


def test_a_block_that_normalises_the_stream_itself_breaks_it() -> None:
    model = BUILDERS["opt"]()
    for layer in model.model.decoder.layers:
        layer.do_layer_norm_before = False
    with pytest.raises(NoStream):
        stream_of(model)


# --- closed forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6, eps=1e-6)])
def test_a_norm_pulls_an_error_back_as_autograd_does(norm: nn.Module) -> None:
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1, 0.3)
    x, at_output = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)
    (expected,) = torch.autograd.grad(norm(x), x, at_output)
    with torch.no_grad():
        found = Norm.of(norm, x.detach())
        assert found is not None and found.centred == isinstance(norm, nn.LayerNorm)
        torch.testing.assert_close(found.pull(x, at_output), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("module", [nn.Identity(), nn.Linear(6, 6), nn.SiLU(), nn.Softmax(-1)], ids=repr)
def test_other_modules_are_no_norms(module: nn.Module) -> None:
    with torch.no_grad():
        assert Norm.of(module, torch.randn(5, 6)) is None


def test_slope() -> None:
    z = torch.randn(1000, requires_grad=True)
    for act in (nn.functional.silu, nn.functional.gelu, torch.tanh):
        (expected,) = torch.autograd.grad(act(z).sum(), z)
        torch.testing.assert_close(slope_of(act, z.detach()), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kept", [None, 5])
def test_cross_entropy_knows_its_slope(kept: int | None) -> None:
    batch = token_batch()
    if kept:
        batch["labels"][:, :-4] = -100
    logits = torch.randn(8, kept or 10, 64, requires_grad=True)
    loss = cross_entropy(logits, batch["labels"])
    if kept is None:  # transformers' own
        model_loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
        )
        torch.testing.assert_close(loss.values, model_loss)
    (expected,) = torch.autograd.grad(loss.values, logits)
    torch.testing.assert_close(loss.error(), expected)


# --- the estimate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", BUILDERS)
def test_it_is_the_gradient_with_the_pattern_of_attention_fixed(
    name: str, dtype: torch.dtype, tolerance: float, attention: bool
) -> None:
    """All positions are read, so nothing else is neglected."""
    model = BUILDERS[name]().to(dtype)
    if name == "opt":  # a central difference is not the slope at a kink
        for layer in model.model.decoder.layers:
            layer.activation_fn, tolerance = nn.GELU(), max(tolerance, 1e-3)
    optimizer, closure = Guided(model, rank=64, attention=attention), closure_of(model, token_batch())
    found = estimated(optimizer, closure)
    optimizer.branches.detach()
    with detached(model, ("mlp",)) if name == "mixtral" else nullcontext(), fixed_pattern(attention):
        expected = gradient(optimizer, closure)
    stream = stream_of(model)
    inner = [w.feed_forward for block in stream.blocks for w in block.writers if w.feed_forward]
    within = [m.name for f in inner for m in (f.gate, f.up) if m is not None]
    values = [w.attention.values.name for w in stream.writers if w.attention] if attention else []
    assert found.keys() == {*names(stream), *within, *values} and len(values) == 2 * attention
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


def test_coefficients_already_trained_are_part_of_the_way_back() -> None:
    model = llama()
    optimizer, closure = Guided(model, rank=64, lr=0.01, attention=True), closure_of(model, token_batch())
    for _ in range(3):
        optimizer.step(closure)
    assert max(float(c.abs().max()) for c in optimizer.coefficients.values()) > 0.01
    found = estimated(optimizer, closure)
    with fixed_pattern():
        expected = gradient(optimizer, closure)  # the side branches are in the model
    assert all(error(found[name], expected[name]) < 1e-3 for name in found)


def test_the_error_goes_to_rows_that_the_loss_reads_only() -> None:
    """And the values of all rows count. Padding is on the left; the first rows read by an example may be padding."""
    model, batch = llama(), {name: tensor.flip(1) for name, tensor in token_batch().items()}
    batch["labels"][:, :-3] = -100
    closure = closure_of(model, batch, logits_to_keep=4)
    optimizer = Guided(model, rank=64, attention=True)
    optimizer.set_bases({m.name: torch.eye(m.d_in) for m in optimizer.maps})  # values have inputs at other rows too
    found = estimated(optimizer, closure)
    with fixed_pattern(), only_final_rows(model, 4):
        expected = gradient(optimizer, closure)
    assert any("v_proj" in name for name in found)
    assert {name: e for name in found if (e := error(found[name], expected[name])) > 1e-3} == {}


def test_attention_weights_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    closure, optimizer = closure_of(model, token_batch()), Guided(model, rank=8, attention=True)
    whole = estimated(optimizer, closure)
    monkeypatch.setattr("zoft.optim.attention.LARGE", 1)
    parts = estimated(optimizer, closure)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_values_that_are_not_trained_are_gone_through_all_the_same() -> None:
    model = llama()
    closure, frozen = closure_of(model, token_batch()), ("lm_head", "*.v_proj")
    whole = estimated(optimizer := Guided(model, rank=64, attention=True), closure)
    optimizer.branches.detach()
    part = estimated(Guided(model, rank=64, attention=True, exclude=frozen), closure)
    assert whole.keys() - part.keys() == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}
    for name in part:
        torch.testing.assert_close(part[name], whole[name])


def test_attention_that_is_computed_otherwise_is_not_gone_through() -> None:
    model = llama(attn_implementation="eager")
    closure, none = closure_of(model, token_batch()), Guided(llama(), rank=8)
    found = estimated(Guided(model, rank=8, attention=True), closure)
    assert found.keys() == estimated(none, closure_of(none.model, token_batch())).keys()


def test_attention_is_seen_only_while_it_is_looked_at() -> None:
    before, calls = F.scaled_dot_product_attention, []
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ZeroDivisionError), attended(calls.append):
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
        raise ZeroDivisionError
    assert len(calls) == 1 and calls[0].causal and calls[0].scale == 0.5
    assert F.scaled_dot_product_attention is before


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
    ends |= {"v_proj"} if attention else set()
    assert {name.rpartition(".")[2] for name in optimizer.coefficients} == ends
    assert optimizer.bases.keys() == optimizer.coefficients.keys()
    assert {m.name for m in optimizer.branches.active} == optimizer.coefficients.keys()


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


def test_a_closure_without_the_slope_is_refused() -> None:
    model, batch = llama(), token_batch()
    with pytest.raises(TypeError, match="Loss"):
        Guided(model).step(lambda: model(**batch).loss)


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
