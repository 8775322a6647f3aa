"""Guided takes any loss that autograd can follow back to the end of the stream, and records nothing of the blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
)
from transformers import T5ForConditionalGeneration as T5

from zoft.optim import Guided, Loss, NoStream, cross_entropy

from .guidance import BUILDERS, closure_of, error, estimated, gradient, stream_of
from .models import GROUPED, SIZES, VOCABULARY, llama, token_batch


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The loss that a transformers model makes of its labels."""
    return lambda: model(**batch).loss


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-4) -> bool:
    return one.keys() == other.keys() and all(error(one[name], other[name]) < tolerance for name in one)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "bart"])  # whose own does not shift the labels
def test_the_models_own_loss_gives_what_the_slope_in_closed_form_does(name: str, attention: bool) -> None:
    """Where logits are scaled, too."""
    found = []
    for make in (closure_of, own_loss):
        optimizer = Guided(model := BUILDERS[name](), attention=attention)
        found.append(estimated(optimizer, make(model, token_batch())))
        runs_again = attention and name != "openai-gpt"  # whose attention is not torch's
        assert optimizer.counters.forwards == 1 + runs_again
    assert found[0] and same(*found)


def classifier() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**GROUPED, num_labels=3)).eval()
    return model, own_loss(model, token_batch() | {"labels": torch.arange(8) % 3})


def encoder() -> tuple[nn.Module, Callable[[], Tensor]]:
    """It reads the first token, and its tokens each other in both directions."""
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, intermediate_size=48, num_labels=3)).eval()
    return model, own_loss(model, token_batch() | {"labels": torch.arange(8) % 3})


def masked() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES, intermediate_size=48)).eval()
    return model, own_loss(model, token_batch())


class Capped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).logits.tanh()


def capped() -> tuple[nn.Module, Callable[[], Tensor]]:
    model, batch = Capped(llama()), token_batch()
    return model, lambda: cross_entropy(model(**batch), batch["labels"]).values


@pytest.mark.parametrize(
    "make, head",
    [
        (classifier, {"score"}),
        (capped, {"model.lm_head"}),
        (encoder, {"classifier.dense", "classifier.out_proj"}),
        (masked, {"cls.predictions.transform.dense"}),
    ],
)
def test_a_head_of_any_kind_may_follow(
    make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]], head: set[str]
) -> None:
    """And learns, if it is not left out. Once such models were refused, then their heads stayed as they were."""
    model, closure = make()
    optimizer = Guided(model, rank=64, attention=True, energy=1.0, exclude=())
    found = estimated(optimizer, closure)
    optimizer.branches.detach()
    assert optimizer.estimator._stream is not None and optimizer.estimator._stream.head is None
    expected = gradient(optimizer, lambda: Loss(closure()))
    assert head == {name for name in found if ".layer" not in name}
    assert len(found) == len(head) + (12 if make in (encoder, masked) else 14)
    assert {name: e for name in found if (e := error(found[name], expected[name])) > 1e-3} == {}


def test_nor_need_it_be_differentiated_by_hand() -> None:
    """A slope at the logits is of no use where it is not known how they come from the head."""
    model, batch = Capped(llama()), token_batch()
    found = [
        estimated(Guided(model, exclude=("*lm_head",)), closure)
        for closure in (
            lambda: cross_entropy(model(**batch), batch["labels"]),
            lambda: cross_entropy(model(**batch), batch["labels"]).values,
        )
    ]
    assert same(*found)


def test_the_last_norm_may_run_before_the_blocks_too() -> None:
    """NanoChat's makes their input. Once that was taken for a second forward pass."""
    found = []
    for make in (closure_of, own_loss):
        model = llama()
        model.model.embed_tokens = nn.Sequential(model.model.embed_tokens, model.model.norm)
        found.append(estimated(Guided(model), make(model, token_batch())))
    assert len(found[0]) == 8 and same(*found)


class Fused(nn.Module):
    """Log-probabilities by the head's weight, without calling the head, as trainers that save memory take them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, :-1]
        logits = hidden @ self.model.lm_head.weight.t()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def test_the_head_need_not_be_called() -> None:
    model, batch = Fused(llama()), token_batch()
    found = estimated(Guided(model), lambda: model(**batch))
    expected = estimated(Guided(model.model), closure_of(model.model, batch))
    assert same({name.removeprefix("model."): factor for name, factor in found.items()}, expected)


def test_nothing_of_the_blocks_is_recorded() -> None:
    """What autograd saves is of the head and the loss, however many blocks there are."""
    counts = []
    for blocks in (1, 3):
        model, saved = llama(num_hidden_layers=blocks), []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, output: pytest.fail() if output.requires_grad else None)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            Guided(model).step(own_loss(model, token_batch()))
        assert all(parameter.grad is None for parameter in model.parameters())
        counts.append(len(saved))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("grad", [True, False])
def test_whether_autograd_records_is_afterwards_what_it_was(grad: bool) -> None:
    model, batch = llama(), token_batch()
    optimizer = Guided(model)

    def breaks() -> Tensor:
        raise KeyError(own_loss(model, batch)())

    with torch.set_grad_enabled(grad):
        optimizer.step(own_loss(model, batch))
        assert torch.is_grad_enabled() == grad
        with pytest.raises(KeyError):
            optimizer.step(breaks)
        assert torch.is_grad_enabled() == grad and not model.model.norm._forward_hooks


def test_one_loss_for_each_example_counts_as_their_mean() -> None:
    def each(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits[:, -1], batch["labels"][:, -1], reduction="none")

    batch = token_batch()
    whole = estimated(Guided(model := llama()), lambda: each(model, batch))
    mean = estimated(Guided(other := llama()), lambda: each(other, batch).mean())
    assert same(whole, mean)


def test_a_head_may_be_called_for_each_part_of_a_batch() -> None:
    """Its factor is the sum over its calls."""

    class Parts(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.head = model, nn.Linear(32, VOCABULARY)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, parts: int) -> Tensor:
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return torch.cat([self.head(part) for part in hidden.split(len(hidden) // parts)])

    torch.manual_seed(0)
    model, batch = Parts(llama().model), token_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def loss(parts: int) -> Tensor:
        return cross_entropy(model(**inputs, parts=parts), batch["labels"]).values

    found = [estimated(Guided(model, rank=64), partial(loss, parts)) for parts in (1, 2)]
    assert "head" in found[0] and same(*found)


def test_a_small_slope_survives_half_precision() -> None:
    """Float16 ends at 6e-8, and a loss averaged over many tokens has such slopes."""
    batch = token_batch()
    found = []
    for dtype in (torch.float32, torch.float16):
        model = llama().to(dtype)
        found.append(estimated(Guided(model), lambda model=model: own_loss(model, batch)() * 1e-4))
    assert same(*found, tolerance=0.03)


def test_what_has_no_slope_is_refused() -> None:
    model, batch = llama(), token_batch()
    for closure in (lambda: own_loss(model, batch)().detach(), lambda: own_loss(model, batch)().item()):
        with pytest.raises(ValueError, match="autograd cannot follow it to the logits"):
            Guided(model).step(closure)
    with torch.inference_mode(), pytest.raises(ValueError, match="autograd cannot follow it to the logits"):
        Guided(model).step(own_loss(model, batch))
    with pytest.raises(ValueError, match="of one forward pass, not of 2"):
        Guided(model).step(lambda: own_loss(model, batch)() + own_loss(model, batch)())


def test_a_slope_that_was_there_before_is_missed() -> None:
    model, batch = llama(), token_batch()
    optimizer = Guided(model)
    optimizer.step(closure_of(model, batch))
    with pytest.raises(TypeError, match="which the closure gave before"):
        optimizer.step(own_loss(model, batch))


@pytest.mark.parametrize("tied", [True, False])
def test_an_encoder_is_no_part_of_the_stream(tied: bool) -> None:
    """Its tokens are others than the decoder's, even where there are as many. Without scaled logits, it once was."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=VOCABULARY, tie_word_embeddings=tied, **sizes)
    model, batch = T5(config).eval(), token_batch()
    with pytest.raises(NoStream, match=r"several lists of blocks \(decoder.block, encoder.block\)"):
        Guided(model).step(own_loss(model, batch))
    with pytest.raises(NoStream):
        Guided(model).step(own_loss(model, batch | {"labels": batch["labels"][:, :4].contiguous()}))


def test_a_known_head_is_found_with_any_loss() -> None:
    assert stream_of(llama()).head is not None
