"""Does a premise entail a hypothesis, contradict it, or neither? (CommitmentBank, SuperGLUE)"""

from zoft.data.task import Task

TASK = Task(
    name="cb",
    title="CB",
    kind="classification",
    hub=("aps/super_glue", "cb"),
    prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
    words={"0": "Yes", "1": "No", "2": "Maybe"},
    passage="premise",
)
