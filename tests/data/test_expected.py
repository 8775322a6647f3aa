"""What is expected of a metric when the model's answers are drawn: its value, and its slope."""

import pytest
import torch
from test_objective import CHOICES, CLASSES, LONG_CLASSES, PAD, items_of
from torch import Tensor

from zoft.data import Collator, divide, drawn, examples, losses, positions_to_keep, slope

PROMPTS = items_of("generation", [[[30]]] * 3, [0, 0, 0])


def whole_slope(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(slope(logits, batch)), 1)


def by_autograd(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(losses(logits, batch).mean(), logits)[0]


def candidates(name: str) -> tuple[dict[str, Tensor], Tensor]:
    items = {"words": CLASSES, "longer": LONG_CLASSES, "choice": CHOICES}[name]
    batch = Collator(PAD, "eval")(items)
    logits = torch.randn(len(batch["input_ids"]), positions_to_keep(batch), 50)
    return batch | {"shortfalls": torch.rand(3, 4 if name == "choice" else 3)}, logits


@pytest.mark.parametrize("name", ["words", "longer", "choice"])
def test_over_candidates_it_is_exact(name: str) -> None:
    """Also where an example has fewer than another."""
    batch, logits = candidates(name)
    torch.testing.assert_close(whole_slope(logits, batch), by_autograd(logits, batch), rtol=1e-4, atol=1e-7)
    right = {name: tensor for name, tensor in batch.items() if name != "shortfalls"}
    shares = torch.exp(-losses(logits, right))  # of the right ones
    wrong = 1 - torch.nn.functional.one_hot(batch["targets"], batch["shortfalls"].shape[1])
    torch.testing.assert_close(losses(logits, batch | {"shortfalls": wrong.float()}), 1 - shares)


def answers_of(lengths: list[int], shortfalls: Tensor) -> dict[str, Tensor]:
    answers = torch.randint(1, 50, (len(lengths), max(lengths)))
    return drawn(Collator(PAD, "generate")(PROMPTS), answers, lengths, shortfalls)


def test_a_batch_of_answers_drawn() -> None:
    batch = answers_of([1, 3, 2, 3, 1, 2], torch.rand(6))
    assert [int(row.sum()) for row in batch["attention_mask"]] == [7, 9, 3, 4, 4, 5]  # prompts of 6, 1 and 3 tokens
    for row, mask, labels, places in zip(*(batch[n] for n in ("input_ids", "attention_mask", "labels", "position_ids")),
                                         strict=True):  # fmt: skip
        assert places[mask.bool()].tolist() == list(range(int(mask.sum())))
        answer = labels != -100
        assert torch.equal(labels[answer], row[answer]) and not bool((answer & ~mask.bool()).any())
    assert [int((row != -100).sum()) for row in batch["labels"]] == [1, 3, 2, 3, 1, 2]
    assert positions_to_keep(batch) == 4
    found = examples(batch)
    assert found is not None and found.tolist() == [0, 0, 1, 1, 2, 2]
    assert [part["drawn"].tolist() for part in divide(batch, 3)] == batch["drawn"].view(3, 2).tolist()


@pytest.mark.parametrize("together", [1, 1 << 22])
def test_autograd_takes_the_same_slope(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoft.data.objective.LARGE", together)
    batch = answers_of([1, 3, 2, 3, 1, 2], torch.rand(6))
    logits = torch.randn(6, positions_to_keep(batch), 50)
    torch.testing.assert_close(whole_slope(logits, batch), by_autograd(logits, batch), rtol=1e-4, atol=1e-7)
    expected = batch["drawn"].view(3, 2).mean(1)
    assert torch.equal(losses(logits, batch), expected)
    torch.testing.assert_close(losses(logits.requires_grad_(), batch), expected)


def test_over_answers_drawn_it_is_unbiased() -> None:
    """The mean over all the ways to draw two answers of one token is the gradient of what is expected."""
    worth, logits = torch.rand(5), torch.randn(5)
    shares = logits.softmax(0)
    exact, found = shares * (worth - shares @ worth), torch.zeros(5)
    prompt = Collator(PAD, "generate")(PROMPTS[:1])
    for one in range(5):
        for other in range(5):
            tokens = torch.tensor([[one], [other]])
            batch = drawn(prompt, tokens, [1, 1], worth[tokens[:, 0]])
            given = whole_slope(torch.stack((logits, torch.zeros(5))).expand(2, 2, 5), batch)
            found += shares[one] * shares[other] * given[:, 0].sum(0)
    torch.testing.assert_close(found, exact)


def test_answers_that_are_worth_the_same_say_nothing() -> None:
    batch = answers_of([1, 3, 2, 3, 1, 2], torch.ones(6))
    assert not whole_slope(torch.randn(6, positions_to_keep(batch), 50), batch).any()
