"""Does a premise, from one of many genres, entail a hypothesis, contradict it, or neither?"""

from dataclasses import replace

from .snli import TASK as SNLI

TASK = replace(
    SNLI,
    name="mnli",
    title="MNLI",
    hub=("nyu-mll/glue", "mnli"),
    splits={"validation": "validation_matched"},
)
