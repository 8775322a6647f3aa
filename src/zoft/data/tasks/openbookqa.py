"""Questions of elementary science: which choice ends the sentence, or answers it?"""

from zoft.data.task import Task

from .arc_easy import lettered_choices

TASK = Task(
    name="openbookqa",
    title="OpenBookQA",
    kind="choice",
    hub=("allenai/openbookqa", "main"),
    adapt=lettered_choices,
    prompt="{question_stem}",
)
