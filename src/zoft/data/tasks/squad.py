"""Answer a question about a paragraph with words of it."""

from zoft.data.task import Task

TASK = Task(
    name="squad",
    title="SQuAD",
    kind="generation",
    hub=("rajpurkar/squad", None),
    adapt=lambda row: {"answers": list(row["answers"]["text"])},
    prompt="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
    passage="context",
    metric="f1",
    also=("exact_match",),
    max_new_tokens=50,
    stop="\n",
)
