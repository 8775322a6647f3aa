"""The residual stream is found, and what is known of it in closed form is autograd's."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MambaConfig

from zoft.optim import Guided, Loss, cross_entropy, recording, stream
from zoft.optim.block import Writer
from zoft.optim.layers import find_linear_maps
from zoft.optim.recording import Call, Heads
from zoft.optim.shelf import SLAB
from zoft.optim.stream import NoStream, find_stream
from zoft.optim.transpose import Norm, slope_of, transposed_product

from .guidance import BUILDERS, NORMALISED, names, stream_of
from .models import SIZES, build, llama, mlp, token_batch


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
        "lfm2": ("out_proj", "w2"),
        "mixtral": ("o_proj",),  # experts are called with rows of their own
        "minimax": ("o_proj",),
        "bert": ("dense", "dense"),
        "roberta before its head": ("dense", "dense"),
        "openai-gpt": ("c_proj", "c_proj"),
        "opt normalised": ("out_proj", "fc2"),
        "bart": ("out_proj", "fc2"),
    }.get(name, ("o_proj", "down_proj"))
    assert [n.rpartition(".")[2] for n in names(stream)] == [*ends, *ends]
    gain = 0.3 if name == "granite" else 1.0
    for block in stream.blocks:
        for writer in block.writers:
            assert writer.gain == (pytest.approx(gain, rel=0.02) if name == "granite" else 1.0)  # exactly: see resuming
            assert (writer.norm is not None) == (name in ("gemma3", "olmo2"))
        assert [w.feed_forward is not None for w in block.writers] == [False, True][: len(ends)]
    assert [block.parallel for block in stream.blocks] == [name in ("gpt-neox", "cohere", "phi")] * 2
    if name in ("bert", "roberta before its head", "opt normalised"):  # something is between the stream and the head
        assert stream.head is None
    else:
        assert stream.head.scale == pytest.approx({"granite": 0.25, "cohere": 0.25}.get(name, 1.0), rel=0.01)


@pytest.mark.parametrize("name", BUILDERS)
def test_norms_of_the_stream_are_steps_of_it(name: str) -> None:
    """Where they end blocks, the last of them is what the stream ends with."""
    first, last = ([type(step) for step in block.steps] for block in stream_of(BUILDERS[name]()).blocks)
    if name == "minimax":
        assert first == last == [Norm, Writer, Norm]
    elif name in NORMALISED:
        assert (first, last) == ([Writer, Norm, Writer, Norm], [Writer, Norm, Writer])
    else:
        assert Norm not in {*first, *last}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stream_may_be_finer_than_what_reads_it(dtype: torch.dtype) -> None:
    """Mamba keeps it in float32, and rounds what its norm makes of it for the head."""
    model = build(MambaConfig(**SIZES, state_size=8)).to(dtype)
    assert names(stream_of(model)) == ["backbone.layers.0.mixer.out_proj", "backbone.layers.1.mixer.out_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_of_a_sum_has_no_writer(dtype: torch.dtype) -> None:
    """Once shared experts were taken for one, times whatever sums of modules that are sums of each other left free."""
    model = BUILDERS["glm4 moe"]()
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(layer.mlp, nn.RMSNorm(SIZES["hidden_size"]))
    assert [n.rpartition(".")[2] for n in names(stream_of(model.to(dtype)))] == ["o_proj", "down_proj", "o_proj"]


@pytest.mark.parametrize("small", ["down_proj", "o_proj"])
def test_a_writer_that_adds_next_to_nothing_is_found(small: str) -> None:
    """Once its block was taken for one without writers: least squares chose by the share of what is added."""
    model = llama()
    for name, parameter in model.named_parameters():
        if small in name:
            parameter.data *= 1e-3
    assert [n.rpartition(".")[2] for n in names(stream_of(model))] == ["o_proj", "down_proj"] * 2


def test_a_look_keeps_few_rows_and_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it held views of all rows of every attention, and the logits of all tokens, while it looked."""
    model, batch, logits = llama(), token_batch(), []
    seen: list[torch.Tensor] = []

    def closure() -> Loss:
        found = model(batch["input_ids"]).logits
        logits.append(weakref.ref(found))
        return cross_entropy(found, batch["labels"])

    def norm_before(x: torch.Tensor, calls: list[Call]) -> Any:
        assert logits[0]() is None
        return found_before(x, calls)

    def heads(*rows: torch.Tensor) -> Heads:
        seen.extend(rows)
        return Heads(*rows)

    found_before = stream.norm_before
    monkeypatch.setattr(stream, "norm_before", norm_before)
    monkeypatch.setattr(recording, "Heads", heads)
    optimizer = Guided(model)
    optimizer.step(closure)
    assert len(logits) == 2 and optimizer.counters.forwards == 1
    assert seen and all(x.shape[0] == recording.ROWS for x in seen)
    assert {x.untyped_storage().nbytes() for x in seen} == {SLAB}


def test_a_model_without_a_stream_says_what_is_missing() -> None:
    model, x = mlp(), torch.randn(6, 10)
    with pytest.raises(NoStream, match="norm"):
        find_stream(model, lambda: model(x))


def test_blocks_that_run_more_than_once_are_refused() -> None:
    """What is kept of a block is that of one run: once the estimate was half of what it should have been."""

    class Twice(nn.ModuleList):
        def __iter__(self) -> Iterator[nn.Module]:
            return iter([*self._modules.values()] * 2)

        def __getitem__(self, index: Any) -> Any:
            return self if isinstance(index, slice) else super().__getitem__(index)

    model = llama()
    model.model.layers = Twice(model.model.layers)
    with torch.no_grad(), pytest.raises(NoStream, match="LlamaForCausalLM runs some of its blocks more than once"):
        find_stream(model, lambda: model(**token_batch(), use_cache=False))


@pytest.mark.parametrize("fails", [ValueError("b, t, d"), AttributeError("shape"), RuntimeError("conv"), None])
def test_a_module_that_takes_no_rows_is_no_norm(fails: Exception | None) -> None:
    """Whatever it raises, and if it returns a tuple, as recurrent ones do: once that ended the search."""

    class Mixer(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            if fails is not None:
                raise fails
            return x, None

    assert Norm.of(Mixer(), torch.randn(3, 8)) is None


def test_a_block_that_normalises_a_sum_of_who_knows_what_ends_the_stream() -> None:
    """What is before it is not reached: the error does not go through."""
    model = BUILDERS["opt normalised"]()
    first, second = model.model.decoder.layers
    expected = names(stream_of(model))[2:]
    first.self_attn_layer_norm = nn.Sequential(nn.Tanh(), first.self_attn_layer_norm)
    assert names(stream_of(model)) == expected
    second.final_layer_norm = nn.Sequential(nn.Tanh(), second.final_layer_norm)
    with pytest.raises(NoStream, match="no block"):
        stream_of(model)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_are_multiplied_as_few_are(dtype: torch.dtype) -> None:
    """They are filled up, so that there are not as many compiled products as batches have different sizes."""
    model, error = llama().to(dtype), torch.randn(100, 32)
    (layer,) = [layer for layer in find_linear_maps(model) if layer.name == "model.layers.0.self_attn.o_proj"]
    with torch.no_grad():
        found, weight = transposed_product(layer, error), layer.modules[0].weight.float()
    torch.testing.assert_close(found, error.to(dtype).float() @ weight, rtol=0.02, atol=0.02)
    assert found.shape == (100, 32) and found.dtype == torch.float32


def test_slope() -> None:
    z = torch.randn(1000, requires_grad=True)
    for act in (nn.functional.silu, nn.functional.gelu, torch.tanh):
        (expected,) = torch.autograd.grad(act(z).sum(), z)
        torch.testing.assert_close(slope_of(act, z.detach()), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("together", [1, 1 << 22])
@pytest.mark.parametrize("kept", [None, 5])
def test_cross_entropy_knows_its_slope(kept: int | None, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoft.optim.loss.LARGE", together)
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
    torch.testing.assert_close(torch.cat(list(loss.error()), 1), expected)
