import torch
from hypothesis import given
from hypothesis import strategies as st

from zoft.data import Collator, Item, divide

PAD = 0
ids = st.lists(st.integers(1, 99), min_size=1, max_size=9)


@st.composite
def batches(draw: st.DrawFn) -> list[Item]:
    kind = draw(st.sampled_from(["classification", "choice", "generation"]))
    words = draw(st.lists(ids, min_size=2, max_size=4))

    def item(index: int) -> Item:
        candidates = {
            "classification": words,
            "choice": draw(st.lists(ids, min_size=2, max_size=4)),
            "generation": [draw(ids)],
        }[kind]
        gold = draw(st.integers(0, len(candidates) - 1))
        return Item(index, draw(ids), candidates, gold, truncated=False, kind=kind)

    return [item(index) for index in range(draw(st.integers(1, 4)))]


def unpadded(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The sequences, after checking that the padding is on the left and the positions count the tokens."""
    sequences = []
    for tokens, mask, positions in zip(batch["input_ids"], batch["attention_mask"], batch["position_ids"], strict=True):
        length = int(mask.sum())
        start = len(mask) - length
        assert mask.tolist() == [0] * start + [1] * length
        assert tokens[:start].tolist() == [PAD] * start
        assert positions.tolist() == [0] * start + list(range(length))
        sequences.append(tokens[start:].tolist())
    return sequences


def answers(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The labels, after checking that they are the input's own last tokens."""
    found = []
    for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        answer = labels[labels != -100]
        assert torch.equal(answer, tokens[len(tokens) - len(answer) :])
        assert torch.equal(answer, labels[len(labels) - len(answer) :])
        found.append(answer.tolist())
    return found


@given(batches())
def test_train_round_trip(items: list[Item]) -> None:
    batch = Collator(PAD, "train")(items)
    assert batch["index"].tolist() == [item.index for item in items]
    if "label_words" in batch:
        assert unpadded(batch) == [item.prompt for item in items]
        assert [[word] for word in batch["label_words"].tolist()] == items[0].candidates
        assert "labels" not in batch
    elif items[0].kind == "classification":
        assert answers(batch) == [word for item in items for word in item.candidates]
        assert batch["norms"].tolist() == [1.0] * sum(batch["counts"].tolist())
    else:
        right = [item.candidates[item.gold] for item in items]
        assert answers(batch) == right
        assert unpadded(batch) == [item.prompt + answer for item, answer in zip(items, right, strict=True)]
        assert "counts" not in batch and "targets" not in batch
    if items[0].kind == "classification":
        assert batch["targets"].tolist() == [item.gold for item in items]
    assert all(tensor.dtype == (torch.float32 if name == "norms" else torch.int64) for name, tensor in batch.items())


@given(batches())
def test_eval_has_every_candidate(items: list[Item]) -> None:
    batch = Collator(PAD, "eval")(items)
    if "counts" not in batch:
        assert items[0].kind == "generation" or "label_words" in batch
        return
    assert batch["counts"].tolist() == [len(item.candidates) for item in items]
    assert unpadded(batch) == [item.prompt + candidate for item in items for candidate in item.candidates]
    assert answers(batch) == [candidate for item in items for candidate in item.candidates]
    assert batch["targets"].tolist() == [item.gold for item in items]
    if items[0].kind == "choice":
        assert batch["norms"].tolist() == [len(candidate) for item in items for candidate in item.candidates]


@given(batches(), st.sampled_from(["train", "eval"]), st.integers(1, 9))
def test_parts_of_a_batch_have_its_examples_in_turn(items: list[Item], mode: str, number: int) -> None:
    """As few as make `number`, of as many examples each, every one a batch of its own."""
    batch = Collator(PAD, mode)(items)
    parts = divide(batch, number)
    each = len(items) // len(parts)
    assert each * len(parts) == len(items)
    for name in batch.keys() - {"label_words"}:
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    for i, part in enumerate(parts):
        alone = Collator(PAD, mode)(items[i * each : (i + 1) * each])
        assert part.keys() == alone.keys()
        assert {name: part[name].shape[:1] for name in part} == {name: alone[name].shape[:1] for name in part}
        assert part["index"].tolist() == alone["index"].tolist()
    assert len(parts) >= number or each == 1
    assert not any(len(items) % n == 0 for n in range(number, len(parts)))


@given(batches())
def test_generate_has_the_prompts_alone(items: list[Item]) -> None:
    batch = Collator(PAD, "generate")(items)
    assert unpadded(batch) == [item.prompt for item in items]
    assert set(batch) == {"input_ids", "attention_mask", "position_ids", "index"}
