"""Answer a question about a passage that takes reasoning over it; the metric is MeZO's plain token F1."""

from zoft.data.task import Row, Task


def _answers(row: Row) -> Row:
    return {"answers": row["answers"] if "answers" in row else list(row["answers_spans"]["spans"])}


TASK = Task(
    name="drop",
    title="DROP",
    kind="generation",
    hub=("ucinlp/drop", None),
    adapt=_answers,
    prompt="Passage: {passage}\nQuestion: {question}\nAnswer:",
    passage="passage",
    metric="f1",
    also=("exact_match",),
    max_new_tokens=50,
    stop="\n",
)
