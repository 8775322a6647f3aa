"""What a question asks for, one of six."""

from zoft.data.task import Task

TASK = Task(
    name="trec",
    title="TREC",
    kind="classification",
    hub=("CogComp/trec", None),
    splits={"validation": "test"},
    label="coarse_label",
    prompt="Question: {text}\nAnswer type:",
    words={
        "0": "abbreviation",
        "1": "entity",
        "2": "description",
        "3": "person",
        "4": "location",
        "5": "number",
    },
)
