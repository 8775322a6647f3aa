"""The head that logits come from, and logits that it makes some positions at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, Gemma2Config, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

from optim.models import GROUPED, SIZES, build
from zoft.data import Collator, Item, losses, read_logits, slope
from zoft.data.objective import LateLogits
from zoft.optim import AGZO, Guided, MeZO, ZeroOrder
from zoft.train import task_closures
from zoft.train.head import find_head

TEXTS = [
    Item(0, [5], [[6, 7, 8, 9, 10, 30, 31, 12, 13]], 0, truncated=False, kind="text"),
    Item(1, [11], [[32, 4, 5]], 0, truncated=False, kind="text"),
]
WORDS = [Item(0, [5, 6], [[7], [8]], 0, truncated=False, kind="classification")]


def batch_of(items: list[Item]) -> dict[str, Tensor]:
    return Collator(0, "train")(items)


def calls_of(head: nn.Linear) -> list[int]:
    """Grows by the positions of every call of `head`'s own arithmetic, which no hook sees."""
    calls: list[int] = []

    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x.shape[1])
            return super().forward(x)

    head.__class__ = Head
    return calls


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of three positions of two texts are made at once, those of one held in float32."""
    monkeypatch.setattr("zoft.data.objective.LARGE", 2 * SIZES["vocab_size"])
    monkeypatch.setattr("zoft.data.objective.TOGETHER", 3)


@pytest.mark.parametrize("config", [LlamaConfig(**GROUPED), Qwen3Config(**GROUPED), OPTConfig(**SIZES, ffn_dim=48)])
def test_a_head_whose_output_the_model_returns_is_found(config: Any) -> None:
    model = build(config)
    assert find_head(model) is model.get_output_embeddings()
    assert not model.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**GROUPED, final_logit_softcapping=3.0),
        CohereConfig(**GROUPED, logit_scale=0.25),
        GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=8),
    ],
    ids=["capped", "scaled", "as wide as its input"],
)
def test_a_head_whose_output_is_changed_is_not(config: Any) -> None:
    assert find_head(build(config)) is None


@torch.no_grad()
def test_late_logits_have_the_same_loss_and_slope(late: None) -> None:
    model, batch = build(LlamaConfig(**GROUPED)), batch_of(TEXTS)
    whole, head = read_logits(model, batch), model.lm_head
    calls = calls_of(head)
    found = read_logits(model, batch, head)
    assert not calls and found.shape == whole.shape
    torch.testing.assert_close(losses(found, batch), losses(whole, batch))
    assert calls == [3, 3, 3, 1]
    parts = list(slope(found, batch))
    assert {part.shape[1] for part in parts} == {1}
    torch.testing.assert_close(torch.cat(parts, 1), torch.cat(list(slope(whole, batch)), 1))
    assert torch.equal(read_logits(model, batch), whole)  # the head is as it was


@torch.no_grad()
def test_late_logits_are_for_many_positions(late: None) -> None:
    model = build(LlamaConfig(**GROUPED))
    assert isinstance(read_logits(model, batch_of(WORDS * 9), model.lm_head), Tensor)
    assert isinstance(read_logits(model, batch_of(TEXTS[1:]), model.lm_head), Tensor)


def test_who_watches_the_head_sees_all_logits(late: None) -> None:
    model, batch, seen = build(LlamaConfig(**GROUPED)), batch_of(TEXTS), []
    head = model.lm_head
    logits = read_logits(model, batch, head)  # for autograd
    assert isinstance(logits, Tensor) and logits.requires_grad
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        assert read_logits(model, batch, head) is seen[0]
        handle.remove()
        head.forward = lambda x: nn.functional.linear(x, head.weight) + 1
        assert torch.equal(read_logits(model, batch, head), seen[0] + 1)


@pytest.mark.parametrize(
    ("method", "options"), [(AGZO, {}), (AGZO, {"probe_batching": True}), (Guided, {}), (MeZO, {})]
)
def test_training_is_the_same(method: type[ZeroOrder], options: dict[str, Any], monkeypatch: Any) -> None:
    """MeZO moves the head itself (AGZO does where it is not tied), whose logits are then made as ever."""
    found, reads, split = [], [], LateLogits.split
    monkeypatch.setattr(LateLogits, "split", lambda logits, *size: reads.append(size) or split(logits, *size))
    monkeypatch.setattr("zoft.data.objective.TOGETHER", 3)
    for large in (1 << 20, 2 * SIZES["vocab_size"]):
        assert not reads
        monkeypatch.setattr("zoft.data.objective.LARGE", large)
        model = build(LlamaConfig(**GROUPED, tie_word_embeddings=True)).double()
        optimizer = method(model, lr=1e-3, **options)
        (closure,) = task_closures(model, [batch_of(TEXTS)])
        loss = [float(optimizer.step(closure)) for _ in range(3)]
        optimizer.fold()
        tensors = optimizer.coefficients or dict(model.named_parameters())
        found.append((loss, {name: tensor.detach().clone() for name, tensor in tensors.items()}))
    assert bool(reads) == (method is not MeZO)
    (loss, tensors), (late_loss, late_tensors) = found
    assert late_loss == pytest.approx(loss, rel=1e-5)
    assert len({*loss}) == 3 and tensors.keys() == late_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(late_tensors[name], tensor, rtol=1e-3, atol=1e-6)
