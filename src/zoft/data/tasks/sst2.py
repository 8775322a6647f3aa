"""Sentiment of a sentence from a film review: negative or positive."""

from zoft.data.task import Task

TASK = Task(
    name="sst2",
    title="SST-2",
    kind="classification",
    hub=("nyu-mll/glue", "sst2"),
    prompt="{sentence} It was",
    words={"0": "terrible", "1": "great"},
    passage="sentence",
)
