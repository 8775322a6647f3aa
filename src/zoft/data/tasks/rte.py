"""Does a premise entail a hypothesis? (SuperGLUE)"""

from zoft.data.task import Task

TASK = Task(
    name="rte",
    title="RTE",
    kind="classification",
    hub=("aps/super_glue", "rte"),
    prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
    words={"0": "Yes", "1": "No"},
    passage="premise",
)
