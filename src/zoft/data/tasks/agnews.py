"""The topic of a news item, one of four."""

from zoft.data.task import Task

TASK = Task(
    name="agnews",
    title="AG News",
    kind="classification",
    hub=("fancyzhx/ag_news", None),
    splits={"validation": "test"},
    prompt="{text}\nTopic:",
    words={"0": "World", "1": "Sports", "2": "Business", "3": "Technology"},
    passage="text",
)
