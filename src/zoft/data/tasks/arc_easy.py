"""Science questions from school, the easy ones: which answer is right?"""

from zoft.data.task import Row, Task


def lettered_choices(row: Row) -> Row:
    """The choices and the index of the one whose letter is the answer."""
    return {"choices": row["choices"]["text"], "label": row["choices"]["label"].index(row["answerKey"])}


TASK = Task(
    name="arc_easy",
    title="ARC-Easy",
    kind="choice",
    hub=("allenai/ai2_arc", "ARC-Easy"),
    adapt=lettered_choices,
    prompt="Question: {question}\nAnswer:",
)
