"""Is the answer to a question about a passage yes or no? (SuperGLUE)"""

from zoft.data.task import Row, Task


def _capitalise(row: Row) -> Row:
    question = row["question"].strip().removesuffix("?")
    return {"question": question[:1].upper() + question[1:]}


TASK = Task(
    name="boolq",
    title="BoolQ",
    kind="classification",
    hub=("aps/super_glue", "boolq"),
    adapt=_capitalise,
    prompt="{passage} {question}?\n",
    words={"0": "No", "1": "Yes"},
    passage="passage",
)
