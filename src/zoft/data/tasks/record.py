"""Which entity of a news item fills the gap in a sentence about it? (SuperGLUE)"""

from zoft.data.task import Row, Task


def _fill(row: Row) -> Row:
    return {
        "passage": row["passage"].replace("@highlight\n", "- "),
        "choices": [row["query"].replace("@placeholder", entity) for entity in row["entities"]],
        "label": [index for index, entity in enumerate(row["entities"]) if entity in row["answers"]],
    }


TASK = Task(
    name="record",
    title="ReCoRD",
    kind="choice",
    hub=("aps/super_glue", "record"),
    adapt=_fill,
    prompt="{passage}\n",
    passage="passage",
)
