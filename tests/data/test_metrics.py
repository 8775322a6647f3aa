import pytest

from zoft.data import custom_task, load_task, score, score_each
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
    ("prediction", "answer", "equal"),
    [
        ("-1", "1", False),
        ("3.14", "314", False),
        ("", "A", False),
        ("the", "A", False),
        ("-", "+", False),
        ("C", "C++", False),
        ("...", "!", False),
        ("-1.", "-1", True),
        ('"The cat" (it is).', "cat, it is", True),
        ("¿No?", "no", True),
    ],
)
def test_answers_of_own_data(prediction: str, answer: str, equal: bool) -> None:
    """Once they were compared as SQuAD's are, without any punctuation; the built-in tasks still are."""
    task = custom_task(metric="exact_match")
    row = task.read({"prompt": "?", "completion": answer})
    assert score(task, [prediction], [row]) == {"exact_match": equal}
    assert score_each(custom_task(metric="f1"), "f1", [prediction], [row]) == [equal]
    assert exact_match([prediction], [[answer]]) == (prediction != "¿No?")


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
