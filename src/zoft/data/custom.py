"""A task over the user's own file."""

from collections.abc import Mapping

from zoft.errors import UserError

from .reward import is_reward
from .task import Row, Task, template_columns


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
) -> Task:
    """A task over columns that the user names.

    With `words`, classification: the template, then the word for the value in column `label` ("label" if not
    given). The first column of the template is the one that is cut where the prompt is too long.

    Without, generation: the template ("{prompt}" if not given), then the text in column `label` ("completion" if
    not given; a list holds all accepted texts; the column may be missing if not `answered`). Nothing is cut.

    `metric` is "accuracy" (if not given) or "matthews" for the first, "exact_match" (if not given), "f1" or
    "number_match" for the second, or a reward (`zoft.data.reward`). Raises UserError for a template without columns
    and a metric that does not fit.
    """
    if words and not template:
        raise UserError('label words need a template such as "{text} It was"')
    template = template or "{prompt}"
    columns = template_columns(template)
    known = ("accuracy", "matthews") if words else ("exact_match", "f1", "number_match")
    metric = metric or known[0]
    if metric not in known and not is_reward(metric):
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
        )

    answer = label or "completion"

    def adapt(row: Row) -> Row:
        value = row[answer] if answered else row.get(answer, "")
        return {"answers": [str(text) for text in (value if isinstance(value, list) else [value])]}

    return Task(
        name="custom",
        title="Own data",
        kind="generation",
        prompt=template,
        label=answer,
        adapt=adapt,
        metric=metric,
        answered=answered,
        max_new_tokens=128,
    )
