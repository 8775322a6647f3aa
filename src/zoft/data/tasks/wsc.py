"""Does a pronoun refer to a given phrase? (Winograd Schema Challenge, SuperGLUE)"""

from zoft.data.task import Task

TASK = Task(
    name="wsc",
    title="WSC",
    kind="classification",
    hub=("aps/super_glue", "wsc.fixed"),
    adapt=lambda row: {"span2_text": row["span2_text"].lower()},
    prompt='{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
    words={"0": "No", "1": "Yes"},
)
