"""Is an answer to a question about a paragraph right? A question has several right answers (SuperGLUE)."""

from zoft.data.task import Task

TASK = Task(
    name="multirc",
    title="MultiRC",
    kind="classification",
    hub=("aps/super_glue", "multirc"),
    prompt='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
    words={"0": "No", "1": "Yes"},
    passage="paragraph",
)
