"""Solve a word problem of grade-school mathematics, step by step."""

import re

from zoft.data.task import Row, Task


def _solution(row: Row) -> Row:
    """The solution without the <<calculator marks>> that the data set puts into it."""
    return {"answers": [re.sub(r"<<.*?>>", "", row["answer"])]}


TASK = Task(
    name="gsm8k",
    title="GSM8K",
    kind="generation",
    hub=("openai/gsm8k", "main"),
    splits={"validation": "test"},
    adapt=_solution,
    prompt="Question: {question}\nAnswer:",
    metric="number_match",
    max_new_tokens=256,
    stop="\n\n",
)
