import pytest

from zoft.data import custom_task, parse_words
from zoft.errors import UserError


def test_parse_words() -> None:
    assert parse_words("0= terrible,1= great") == {"0": "terrible", "1": "great"}
    assert parse_words("no = Not really , yes=Yes") == {"no": "Not really", "yes": "Yes"}


@pytest.mark.parametrize("text", ["", "0", "0=", "=a,1=b", "0=a,0=b", "0=a,,1=b", "0=a"])
def test_bad_words(text: str) -> None:
    with pytest.raises(UserError, match="label words"):
        parse_words(text)


def test_classification() -> None:
    task = custom_task("{text} It was", {"neg": "bad", "pos": "good"}, label="mood", metric="matthews")
    row = task.read({"text": "fine ", "mood": "pos"})
    assert (task.kind, task.metric, task.passage) == ("classification", "matthews", "text")
    assert task.show(row) == "fine It was"
    assert task.golds(row) == [1]
    with pytest.raises(UserError, match="column 'mood': 'so' is none of the labels 'neg', 'pos'"):
        task.read({"text": "fine", "mood": "so"})


def test_generation() -> None:
    task = custom_task()
    row = task.read({"prompt": "2+2=\n", "completion": 4})
    assert (task.kind, task.metric, task.show(row)) == ("generation", "exact_match", "2+2=\n")
    assert task.choices(row) == ["4"]
    with pytest.raises(
        UserError, match="no column 'completion'; the columns are 'prompt', 'answer'; name yours, as in"
    ):
        task.read({"prompt": "x", "answer": "y"})
    with pytest.raises(UserError, match="an answer is empty"):
        task.read({"prompt": "x", "completion": " "})
    for value, found in ((None, "null"), ({"a": "b"}, "dict"), (["a", None], "null"), (float("nan"), "NaN")):
        with pytest.raises(UserError, match=f"column 'completion' holds {found}, not text"):
            task.read({"prompt": "x", "completion": value})
    assert custom_task(metric="r.py:f", answered=False).read({"prompt": "x", "completion": None})["answers"] == [""]
    several = custom_task("Q: {q}\nA:", label="a", metric="f1")
    assert several.read({"q": "?", "a": ["one", "1"]})["answers"] == ["one", "1"]
    with pytest.raises(UserError, match=r"no column 'a'; the columns are 'q'$"):
        several.read({"q": "?"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"words": {"0": "a", "1": "b"}}, "label words need a template"),
        ({"template": "no columns"}, "name the columns"),
        ({"template": "{}"}, "name the columns"),
        ({"template": "{open"}, "a brace that is text is written twice"),
        ({"template": "{price:.2f}"}, "columns are shown as they are; write {price}"),
        ({"template": "{x!x}"}, "columns are shown as they are; write {x}"),
        ({"metric": "accuracy"}, "metric 'accuracy' does not fit this task; choose from exact_match, f1"),
        ({"template": "{a}", "words": {"0": "a", "1": "b"}, "metric": "f1"}, "choose from accuracy, matthews"),
    ],
)
def test_mistakes(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        custom_task(**arguments)
