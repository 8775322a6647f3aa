"""Does a word have the same sense in two sentences? (SuperGLUE)"""

from zoft.data.task import Task

TASK = Task(
    name="wic",
    title="WiC",
    kind="classification",
    hub=("aps/super_glue", "wic"),
    prompt=(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
    ),
    words={"0": "No", "1": "Yes"},
)
