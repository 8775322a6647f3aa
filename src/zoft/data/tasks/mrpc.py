"""Do two sentences from the news mean the same?"""

from zoft.data.task import Task

TASK = Task(
    name="mrpc",
    title="MRPC",
    kind="classification",
    hub=("nyu-mll/glue", "mrpc"),
    prompt="{sentence1}\n{sentence2}\nDo these two sentences mean the same? Yes or No?\n",
    words={"0": "No", "1": "Yes"},
)
