from typing import Any, NamedTuple

import pytest

from zoft.data import load_task, task_names
from zoft.data.task import join
from zoft.errors import UserError


class Case(NamedTuple):
    task: str
    row: dict[str, Any]
    texts: list[str]
    """The whole text for each choice."""
    golds: list[int]


NLI = {"premise": "A dog runs.", "hypothesis": "An animal moves"}
SUPPOSE = 'Suppose A dog runs. Can we infer that "An animal moves"? Yes, No, or Maybe?\n'
MOON = {"choices": {"text": ["the sun", "the moon"], "label": ["A", "B"]}, "answerKey": "B"}

CASES = [
    Case(
        "sst2",
        {"sentence": "a fine film ", "label": 1},
        ["a fine film It was terrible", "a fine film It was great"],
        [1],
    ),
    Case(
        "sst5",
        {"text": "so so", "label": 2},
        [f"so so It was {word}" for word in ("terrible", "bad", "okay", "good", "great")],
        [2],
    ),
    Case(
        "rte",
        {**NLI, "label": 0},
        [f'A dog runs.\nDoes this mean that "An animal moves" is true? Yes or No?\n{word}' for word in ("Yes", "No")],
        [0],
    ),
    Case("cb", {**NLI, "label": 1}, [SUPPOSE + "Yes", SUPPOSE + "No", SUPPOSE + "Maybe"], [1]),
    Case("snli", {**NLI, "label": 1}, [SUPPOSE + "Yes", SUPPOSE + "Maybe", SUPPOSE + "No"], [1]),
    Case("mnli", {**NLI, "label": 2}, [SUPPOSE + "Yes", SUPPOSE + "Maybe", SUPPOSE + "No"], [2]),
    Case(
        "mrpc",
        {"sentence1": "He left.", "sentence2": "He went.", "label": 1},
        [f"He left.\nHe went.\nDo these two sentences mean the same? Yes or No?\n{word}" for word in ("No", "Yes")],
        [1],
    ),
    Case(
        "cola",
        {"sentence": "Him runs.", "label": 0},
        [f"Him runs.\nIs this sentence grammatically acceptable? Yes or No?\n{word}" for word in ("No", "Yes")],
        [0],
    ),
    Case(
        "boolq",
        {"passage": "Tea -- Tea is a drink.", "question": "is tea a drink", "label": 1},
        ["Tea -- Tea is a drink. Is tea a drink?\nNo", "Tea -- Tea is a drink. Is tea a drink?\nYes"],
        [1],
    ),
    Case(
        "wsc",
        {"text": "Ann met Eve. She waved.", "span1_text": "Ann", "span2_text": "She", "label": 1},
        [
            "Ann met Eve. She waved.\n"
            f'In the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n{word}'
            for word in ("No", "Yes")
        ],
        [1],
    ),
    Case(
        "wic",
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A savings bank.", "label": 0},
        [
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
            f"A river bank.\nA savings bank.\n{word}"
            for word in ("No", "Yes")
        ],
        [0],
    ),
    Case(
        "multirc",
        {"paragraph": "Tom ate.", "question": "Who ate?", "answer": "Tom", "label": 1},
        [
            f'Tom ate.\nQuestion: Who ate?\nI found this answer "Tom". Is that correct? Yes or No?\n{word}'
            for word in ("No", "Yes")
        ],
        [1],
    ),
    Case(
        "agnews",
        {"text": "Shares fell.", "label": 2},
        [f"Shares fell.\nTopic: {word}" for word in ("World", "Sports", "Business", "Technology")],
        [2],
    ),
    Case(
        "trec",
        {"text": "Who sang ?", "coarse_label": 3, "fine_label": "HUM:ind"},
        [
            f"Question: Who sang ?\nAnswer type: {word}"
            for word in ("abbreviation", "entity", "description", "person", "location", "number")
        ],
        [3],
    ),
    Case(
        "copa",
        {"premise": "I fell.", "choice1": "I slipped.", "choice2": "It hurt.", "question": "effect", "label": 1},
        ["I fell so I slipped.", "I fell so it hurt."],
        [1],
    ),
    Case(
        "copa",
        {"premise": "I fell.", "choice1": "I slipped.", "choice2": "It hurt.", "question": "cause", "label": 0},
        ["I fell because I slipped.", "I fell because it hurt."],
        [0],
    ),
    Case(
        "record",
        {
            "passage": "Ann beat Eve.\n@highlight\nIt was close",
            "query": "In the end @placeholder won.",
            "entities": ["Eve", "Ann"],
            "answers": ["Ann"],
        },
        [
            "Ann beat Eve.\n- It was close\nIn the end Eve won.",
            "Ann beat Eve.\n- It was close\nIn the end Ann won.",
        ],
        [1],
    ),
    Case(
        "squad",
        {"title": "Tea", "context": "Tea is hot.", "question": "What is hot?", "answers": {"text": ["Tea", "tea"]}},
        ["Title: Tea\nContext: Tea is hot.\nQuestion: What is hot?\nAnswer: Tea"],
        [0],
    ),
    Case(
        "drop",
        {"passage": "Two goals.", "question": "How many?", "answers": ["2", "two"]},
        ["Passage: Two goals.\nQuestion: How many?\nAnswer: 2"],
        [0],
    ),
    Case(
        "drop",
        {"passage": "Two goals.", "question": "How many?", "answers_spans": {"spans": ["2"], "types": ["number"]}},
        ["Passage: Two goals.\nQuestion: How many?\nAnswer: 2"],
        [0],
    ),
    Case(
        "gsm8k",
        {"question": "Two and two?", "answer": "It is 2+2=<<2+2=4>>4.\n#### 4"},
        ["Question: Two and two?\nAnswer: It is 2+2=4.\n#### 4"],
        [0],
    ),
    Case(
        "arc_easy",
        {"question": "What shines by night?", **MOON},
        [f"Question: What shines by night?\nAnswer: {thing}" for thing in ("the sun", "the moon")],
        [1],
    ),
    Case(
        "arc_challenge",
        {"question": "What shines?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1"},
        ["Question: What shines?\nAnswer: a", "Question: What shines?\nAnswer: b"],
        [0],
    ),
    Case(
        "openbookqa",
        {"question_stem": "By night shines", **MOON},
        ["By night shines the sun", "By night shines the moon"],
        [1],
    ),
    Case(
        "piqa",
        {"goal": "Dry a cup.", "sol1": "Use a towel.", "sol2": "Use soup.", "label": 0},
        ["Question: Dry a cup.\nAnswer: Use a towel.", "Question: Dry a cup.\nAnswer: Use soup."],
        [0],
    ),
    Case(
        "winogrande",
        {"sentence": "Ann thanked Eve as _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        ["Ann thanked Eve as Ann had helped.", "Ann thanked Eve as Eve had helped."],
        [1],
    ),
]


def test_every_task_has_a_case() -> None:
    assert {case.task for case in CASES} == set(task_names())
    assert len(task_names()) == 24


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_texts(case: Case) -> None:
    task = load_task(case.task)
    row = task.read(case.row)
    prompt = task.show(row)
    assert [join(prompt, choice) for choice in task.choices(row)] == case.texts
    assert task.golds(row) == case.golds
    assert not prompt.endswith(" ")


@pytest.mark.parametrize("name", task_names())
def test_declaration(name: str) -> None:
    task = load_task(name)
    assert task.name == name and task.hub
    assert set(task.splits) <= {"train", "validation"}
    assert task.passage is None or task.passage in task.columns
    assert bool(task.words) == (task.kind == "classification")
    assert bool(task.max_new_tokens) == (task.kind == "generation")


def test_unknown_task() -> None:
    with pytest.raises(UserError, match=r"unknown task 'sst-2'; did you mean sst2\?"):
        load_task("sst-2")
    with pytest.raises(UserError, match="choose from agnews, arc_challenge"):
        load_task("zzzz")


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("sst2", {"text": "x", "label": 1}, "no column 'sentence'; the columns are 'text', 'label'"),
        ("sst2", {"sentence": "x"}, "no column 'label'; the columns are 'sentence'"),
        ("boolq", {"passage": "x", "label": 1}, "no column 'question'"),
        ("sst2", {"sentence": "x", "label": 7}, "column 'label': 7 is none of the labels '0', '1'"),
        ("sst2", {"sentence": ["x"], "label": 1}, "column 'sentence' holds list, not text"),
        ("sst2", {"sentence": None, "label": 1}, "column 'sentence' holds null, not text"),
        ("boolq", {"passage": "x", "question": 3, "label": 1}, "a column is not as task boolq expects it"),
        ("piqa", {"goal": "x", "sol1": "a", "sol2": "b", "label": 2}, "the answer is none of the choices"),
        ("piqa", {"goal": "x", "sol1": "a", "sol2": "", "label": 0}, "an answer is empty"),
        ("drop", {"passage": "x", "question": "y", "answers": "z"}, "expected a list of answers, found str"),
        ("drop", {"passage": "x", "question": "y", "answers": []}, "the answer is none of the choices"),
    ],
)
def test_bad_rows(task: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(task).read(row)


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("It was", "great", "It was great"),
        ("It was ", " great", "It was great"),
        ("Yes or No?\n", "Yes", "Yes or No?\nYes"),
        ("Answer:", "\nfour", "Answer:\nfour"),
    ],
)
def test_join(prompt: str, answer: str, text: str) -> None:
    assert join(prompt, answer) == text
