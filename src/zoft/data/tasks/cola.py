"""Is a sentence grammatical? Its published metric, the Matthews correlation, is reported beside accuracy."""

from zoft.data.task import Task

TASK = Task(
    name="cola",
    title="CoLA",
    kind="classification",
    hub=("nyu-mll/glue", "cola"),
    prompt="{sentence}\nIs this sentence grammatically acceptable? Yes or No?\n",
    words={"0": "No", "1": "Yes"},
    also=("matthews",),
)
