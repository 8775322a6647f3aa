"""Does an image caption entail another sentence, contradict it, or neither?"""

from zoft.data.task import Task

TASK = Task(
    name="snli",
    title="SNLI",
    kind="classification",
    hub=("stanfordnlp/snli", None),
    prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
    words={"0": "Yes", "1": "Maybe", "2": "No"},
    passage="premise",
)
