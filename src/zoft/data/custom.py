"""A task over the user's own file."""

from collections.abc import Mapping

from zoft.errors import UserError

from .form import Form, conversation, text
from .metrics import GENERATED, LIKELIHOOD
from .reward import is_reward
from .task import Row, Task, as_text, template_columns

UNKNOWN = 128  # tokens of a generated answer that no row shows the length of

MEASURED_BY: dict[Form, tuple[str, ...]] = {  # the usual one first
    "answer": (*GENERATED, LIKELIHOOD),
    "conversation": (LIKELIHOOD, *GENERATED),
    "text": (LIKELIHOOD,),
}


def parse_words(text: str) -> dict[str, str]:
    """Label words by label, from "0=terrible,1=great". Raises UserError if the text is not of that form."""
    words: dict[str, str] = {}
    for pair in text.split(","):
        label, equals, word = (part.strip() for part in pair.partition("="))
        if not (equals and label and word) or label in words:
            raise UserError(
                f"label words {text!r}: cannot read {pair!r}; give each label once, as in 0=terrible,1=great"
            )
        words[label] = word
    if len(words) < 2:
        raise UserError(f"label words {text!r}: give at least two, as in 0=terrible,1=great")
    return words


def custom_task(
    template: str | None = None,
    words: Mapping[str, str] | None = None,
    label: str | None = None,
    metric: str | None = None,
    answered: bool = True,
    form: Form = "answer",
) -> Task:
    """A task over columns that the user names, or that rows of their `form` have.

    With `words`, classification: the template, then the word for the value in column `label` ("label" if not
    given). The first column of the template is the one that is cut where the prompt is too long.

    Without, an answer to learn: the template ("{prompt}" if not given), then the text in column `label` ("completion"
    if not given; a list holds all accepted texts; the column may be missing if not `answered`). Or, if neither is
    given, the assistant's messages of a conversation, or a whole text (`zoft.data.form`).

    `metric` is "accuracy" (if not given) or "matthews" for classification. An answer that is generated is measured by
    "exact_match" (if not given), "f1", "number_match" or a reward (`zoft.data.reward`), one that is only read by
    "likelihood", as conversations are if no metric is given, and texts always. What is only read may be cut at its end.

    Raises UserError for a template without columns and a metric that does not fit.
    """
    if words and not template:
        raise UserError('label words need a template such as "{text} It was"')
    remedy = ""
    if template or label:
        form = "answer"
    elif form == "answer":
        remedy = '; name yours, as in --template "{question}" --label answer'
    template = template or "{prompt}"
    columns = template_columns(template)
    known = ("accuracy", "matthews") if words else MEASURED_BY[form]
    metric = metric or known[0]
    if metric not in known and not (is_reward(metric) and form != "text"):
        raise UserError(f"metric {metric!r} does not fit this task; choose from {', '.join(known)}")
    if words:
        return Task(
            name="custom",
            title="Own data",
            kind="classification",
            prompt=template,
            words=words,
            label=label or "label",
            passage=columns[0],
            metric=metric,
            remedy="",
        )

    answer = label or "completion"

    def adapt(row: Row) -> Row:
        if form == "conversation":
            return conversation(row, answered)
        if form == "text":
            return text(row)
        value = row[answer] if answered else row.get(answer)
        if value is None and not answered:
            value = ""
        return {"answers": [as_text(one, answer) for one in (value if isinstance(value, list) else [value])]}

    read = metric == LIKELIHOOD
    return Task(
        name="custom",
        title="Own data",
        kind="text" if read else "generation",
        prompt=template,
        label=answer,
        adapt=adapt,
        metric=metric,
        answered=answered,
        remedy=remedy,
        max_new_tokens=0 if read else UNKNOWN if is_reward(metric) else None,
    )
