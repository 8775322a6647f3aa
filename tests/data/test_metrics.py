import pytest

from zoft.data import load_task, score
from zoft.data.metrics import accuracy, exact_match, f1, matthews, number_match


def test_accuracy() -> None:
    assert accuracy([0, 1, 2, 1], [[0], [0, 1], [1], [1]]) == 0.75


@pytest.mark.parametrize(
    ("predictions", "truths", "expected"),
    [
        ([0, 1, 0, 1], [0, 1, 0, 1], 1.0),
        ([1, 0, 1, 0], [0, 1, 0, 1], -1.0),
        ([1, 1, 1, 1], [0, 1, 0, 1], 0.0),
        ([1, 1, 0, 1, 0], [1, 0, 0, 1, 1], (2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5),
    ],
)
def test_matthews(predictions: list[int], truths: list[int], expected: float) -> None:
    assert matthews(predictions, [[truth] for truth in truths]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Cat!", ["a cat"], 1.0),
        ("cat mat", ["cat"], 2 / 3),
        ("cat", ["dog", "cat mat"], 2 / 3),
        ("cat cat", ["cat"], 2 / 3),
        ("", ["cat"], 0.0),
        ("the", ["a"], 1.0),
    ],
)
def test_f1(prediction: str, answers: list[str], expected: float) -> None:
    assert f1([prediction], [answers]) == pytest.approx(expected)


def test_exact_match() -> None:
    assert exact_match(["The cat.", "cats", "dog"], [["cat"], ["cat"], ["cat", "Dog"]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("so 1,000 + 200\n#### 1,200", 1.0),
        ("#### 1200.0 apples", 1.0),
        ("It is $1200.", 1.0),
        ("#### 12", 0.0),
        ("none", 0.0),
        ("", 0.0),
    ],
)
def test_number_match(prediction: str, expected: float) -> None:
    assert number_match([prediction], [["5 * 240\n#### 1200"]]) == expected


def test_score() -> None:
    cola = load_task("cola")
    rows = [cola.read({"sentence": "x", "label": label}) for label in (0, 1)]
    assert score(cola, [0, 1], rows) == {"accuracy": 1.0, "matthews": 1.0}
    drop = load_task("drop")
    row = drop.read({"passage": "x", "question": "y", "answers": ["two", "2"]})
    assert score(drop, [" 2\nQuestion: more"], [row]) == {"f1": 1.0, "exact_match": 1.0}
    with pytest.raises(ValueError, match="longer"):
        score(drop, ["2"], [row, row])
