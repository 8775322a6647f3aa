"""Which of two ways reaches an everyday goal?"""

from zoft.data.task import Task

TASK = Task(
    name="piqa",
    title="PIQA",
    kind="choice",
    hub=("ybisk/piqa", None),
    adapt=lambda row: {"choices": [row["sol1"], row["sol2"]]},
    prompt="Question: {goal}\nAnswer:",
)
