"""Which of two names fills the gap in a sentence?"""

from zoft.data.task import Row, Task


def _fill(row: Row) -> Row:
    """The sentence up to the gap is the prompt; each option and the rest of the sentence is a choice."""
    start = row["sentence"].partition("_")[0].rpartition(" ")[0]
    rest = row["sentence"][len(start) :].lstrip()
    return {
        "start": start,
        "choices": [rest.replace("_", option) for option in (row["option1"], row["option2"])],
        "label": int(row["answer"]) - 1,
    }


TASK = Task(
    name="winogrande",
    title="WinoGrande",
    kind="choice",
    hub=("allenai/winogrande", "winogrande_xl"),
    adapt=_fill,
    prompt="{start}",
)
