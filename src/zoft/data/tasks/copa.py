"""Which of two sentences is the cause, or the effect, of a premise? (SuperGLUE)"""

from zoft.data.task import Row, Task


def _clauses(row: Row) -> Row:
    return {
        "premise": row["premise"].strip().removesuffix("."),
        "link": "because" if row["question"] == "cause" else "so",
        "choices": [_continue(row["choice1"]), _continue(row["choice2"])],
    }


def _continue(choice: str) -> str:
    """The choice as the rest of a sentence; the pronoun I stays a capital."""
    return choice if choice.startswith(("I ", "I'")) else choice[:1].lower() + choice[1:]


TASK = Task(
    name="copa",
    title="COPA",
    kind="choice",
    hub=("aps/super_glue", "copa"),
    adapt=_clauses,
    prompt="{premise} {link}",
)
