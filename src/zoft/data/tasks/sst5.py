"""Sentiment of a sentence from a film review, in five degrees."""

from zoft.data.task import Task

TASK = Task(
    name="sst5",
    title="SST-5",
    kind="classification",
    hub=("SetFit/sst5", None),
    prompt="{text} It was",
    words={"0": "terrible", "1": "bad", "2": "okay", "3": "good", "4": "great"},
    passage="text",
)
