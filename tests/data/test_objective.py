"""Batched losses and predictions against the same computed one sequence at a time, without padding."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from zoft.data import Collator, Item, choose, losses, positions_to_keep, slope

PAD = 0
PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
ONE_TOKEN = [[20], [21], [22]]
LONGER = [[20], [21, 22, 23], [24, 25]]


def items_of(kind: str, candidates: list[list[list[int]]], golds: list[int]) -> list[Item]:
    return [
        Item(index, prompt, choices, gold, truncated=False, kind=kind)
        for index, (prompt, choices, gold) in enumerate(zip(PROMPTS, candidates, golds, strict=True))
    ]


CLASSES = items_of("classification", [ONE_TOKEN] * 3, [0, 2, 1])
LONG_CLASSES = items_of("classification", [LONGER] * 3, [0, 2, 1])
CHOICES = items_of("choice", [LONGER, [[30, 31], [32]], [[33], [34], [35, 36], [37] * 5]], [1, 0, 3])
REPLIES = [
    Item(0, [5, 6, 7, 8, 9, 10], [[30, 31]], 0, truncated=False, kind="text", earlier=[(1, 2), (3, 5)]),
    Item(1, [11, 12], [[32]], 0, truncated=False, kind="text"),
]
ANSWERS = items_of("generation", [[[30]], [[31, 32, 33, 34]], [[35, 36]]], [0, 0, 0])


def log_probs(model: LlamaForCausalLM, item: Item) -> list[Tensor]:
    """Of each candidate's tokens, one forward each."""
    found = []
    for candidate in item.candidates:
        logits = model(torch.tensor([item.prompt + candidate])).logits[0]
        before = logits[len(item.prompt) - 1 : -1].log_softmax(-1)
        found.append(before[range(len(candidate)), candidate])
    return found


@torch.no_grad()
def run(model: LlamaForCausalLM, batch: dict[str, Tensor], keep: int) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return model(**inputs, logits_to_keep=keep).logits


@pytest.fixture(params=["kept", "all"])
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether the logits are given at all positions, or at those needed only."""
    return request.param == "all"


def batch_and_logits(
    model: LlamaForCausalLM, items: list[Item], mode: str, whole: bool
) -> tuple[dict[str, Tensor], Tensor]:
    batch = Collator(PAD, mode)(items)
    keep = batch["input_ids"].shape[1] if whole else positions_to_keep(batch)
    return batch, run(model, batch, keep)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("items", [CLASSES, LONG_CLASSES], ids=["one token", "longer"])
def test_classification(model: LlamaForCausalLM, items: list[Item], mode: str, whole: bool) -> None:
    scores = [torch.stack([tokens.sum() for tokens in log_probs(model, item)]) for item in items]
    expected = [-score.log_softmax(0)[item.gold] for score, item in zip(scores, items, strict=True)]
    batch, logits = batch_and_logits(model, items, mode, whole)
    torch.testing.assert_close(losses(logits, batch), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert choose(logits, batch).tolist() == [int(score.argmax()) for score in scores]


@pytest.mark.parametrize(
    ("items", "mode"),
    [(CHOICES, "train"), (ANSWERS, "train"), (ANSWERS, "eval")],
    ids=["choice", "generation", "generation eval"],
)
def test_answers(model: LlamaForCausalLM, items: list[Item], mode: str, whole: bool) -> None:
    expected = [-log_probs(model, item)[item.gold].mean() for item in items]
    batch, logits = batch_and_logits(model, items, mode, whole)
    torch.testing.assert_close(losses(logits, batch), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_choice(model: LlamaForCausalLM, whole: bool) -> None:
    scores = [torch.stack([tokens.mean() for tokens in log_probs(model, item)]) for item in CHOICES]
    expected = [-score.log_softmax(0)[item.gold] for score, item in zip(scores, CHOICES, strict=True)]
    batch, logits = batch_and_logits(model, CHOICES, "eval", whole)
    torch.testing.assert_close(losses(logits, batch), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert choose(logits, batch).tolist() == [int(score.argmax()) for score in scores]


def test_choice_is_by_mean_and_classification_by_sum() -> None:
    """Two candidates, of one token with log-probability -1.5 and of two with -1 each, among many others."""
    candidates = [[1], [2, 3]]
    logits = torch.full((2, 3, 1000), -20.0)
    for sequence, position, token, value in [(0, 1, 1, -1.5), (1, 0, 2, -1.0), (1, 1, 3, -1.0)]:
        logits[sequence, position, token] = value
        logits[sequence, position, 999] = torch.log1p(-torch.tensor(value).exp())
    for kind, winner in (("choice", 1), ("classification", 0)):
        batch = Collator(PAD, "eval")([Item(0, [9], candidates, 0, truncated=False, kind=kind)])
        assert choose(logits, batch).tolist() == [winner]


def test_positions_to_keep() -> None:
    assert positions_to_keep(Collator(PAD, "train")(CLASSES)) == 1
    assert positions_to_keep(Collator(PAD, "generate")(ANSWERS)) == 1
    assert positions_to_keep(Collator(PAD, "train")(ANSWERS)) == 5
    assert positions_to_keep(Collator(PAD, "eval")(CHOICES)) == 6


@pytest.mark.parametrize("items", [CLASSES, CHOICES])
def test_half_precision_is_computed_in_float32(model: LlamaForCausalLM, items: list[Item]) -> None:
    batch, logits = batch_and_logits(model, items, "eval", whole=False)
    rounded = logits.bfloat16()
    assert losses(rounded, batch).dtype == torch.float32
    assert torch.equal(losses(rounded, batch), losses(rounded.float(), batch))


def test_earlier_replies_count_as_the_last_does(model: LlamaForCausalLM, whole: bool) -> None:
    batch, logits = batch_and_logits(model, REPLIES, "train", whole)
    (tokens,) = log_probs(model, Item(0, [5], [[6, 7, 8, 9, 10, 30, 31]], 0, truncated=False, kind="text"))
    assert losses(logits, batch)[0].item() == pytest.approx(-tokens[[0, 2, 3, 5, 6]].mean().item(), rel=1e-4)


@pytest.mark.parametrize("together", [1, 1 << 22], ids=["in parts", "at once"])
@pytest.mark.parametrize(
    ("items", "mode"),
    [(CLASSES, "train"), (LONG_CLASSES, "train"), (CHOICES, "train"), (CHOICES, "eval"), (REPLIES, "train")],
    ids=["one token", "longer", "choice", "candidates", "replies"],
)
def test_slope_is_autograds(
    model: LlamaForCausalLM,
    items: list[Item],
    mode: str,
    together: int,
    whole: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zoft.data.objective.LARGE", together)
    batch, logits = batch_and_logits(model, items, mode, whole)
    (expected,) = torch.autograd.grad(losses(logits.requires_grad_(), batch).mean(), logits)
    parts = list(slope(logits, batch))
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-7)
    assert len(parts) == (logits.shape[1] if together == 1 and "labels" in batch else 1)


def test_logits_are_held_in_float32_in_parts(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, logits = batch_and_logits(model, ANSWERS, "train", whole=False)
    together = losses(logits, batch)
    monkeypatch.setattr("zoft.data.objective.LARGE", 2 * logits[:, 0].numel())
    torch.testing.assert_close(losses(logits, batch), together)
