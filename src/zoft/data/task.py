"""What a task is: how a row becomes a prompt and its possible continuations, and how the choice is scored."""

import importlib
import pkgutil
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from zoft.errors import UserError, near_miss

from . import tasks

Row = dict[str, Any]
Kind = Literal["classification", "choice", "generation", "text"]


@dataclass(frozen=True)
class Task:
    """A task, declared.

    `prompt` is a `str.format` template over the columns of a row. What may follow it depends on the kind:

    - classification: one of `words`, which maps each value of the `label` column (as text) to its label word;
    - choice: one of the texts in the column `choices`, the `label` column being the index of the right one, or
      the list of indices if several are right;
    - generation: the first text in the column `answers`, which lists every answer the metric accepts;
    - text: the same, but it is read and not generated, and measured by its likelihood.

    A row of a conversation has `turns` and a `reply` as well (`zoft.data.form`). Data sets whose columns differ from
    these have an `adapt`, which returns the columns to add or replace. Templates, words
    and answers are written without a space where they meet: see `join`.
    """

    name: str
    title: str
    kind: Kind
    prompt: str
    words: Mapping[str, str] = field(default_factory=dict)
    label: str = "label"
    passage: str | None = None
    """The column that may be cut at its end when the prompt is too long; None: nothing may be cut."""
    adapt: Callable[[Row], Row] | None = None
    metric: str = "accuracy"
    also: tuple[str, ...] = ()
    """Metrics reported beside the main one."""
    hub: tuple[str, str | None] | None = None
    """Data set and configuration for `datasets.load_dataset`."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """The hub's names of "train" and "validation" where they differ from these."""
    max_new_tokens: int | None = 0
    """Tokens of a generated answer; None: as many as the rows' own answers are worth (`zoft.data.TaskDataset`)."""
    answered: bool = True
    """Whether rows have to have an answer; one without has the empty text."""
    remedy: str = "; rename yours, or leave --task out and name them by --template (and --words, --label)"
    """What to do if a row lacks a column, said after what is there."""
    stop: str | None = None
    """Generated text ends here, if not at the end-of-sequence token before."""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the prompt shows."""
        return template_columns(self.prompt)

    def read(self, raw: Row) -> Row:
        """The row in the task's own columns, checked; every function that takes rows expects them like this.

        Raises UserError, without the place (which the caller knows), for a missing column, a value of the
        wrong type, or a label that is none of the task's.
        """
        try:
            row = raw | self.adapt(raw) if self.adapt else dict(raw)
            for name in self.columns:
                row[name] = as_text(row[name], name).strip(" ")
            self._check_answer(row)
        except KeyError as error:
            raise UserError(f"no column {error}; the columns are {', '.join(map(repr, raw))}{self.remedy}") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"a column is not as task {self.name} expects it: {error}") from error
        return row

    def show(self, row: Row) -> str:
        """The prompt of a row, without a space at its end."""
        return self.prompt.format_map(row).rstrip(" ")

    def choices(self, row: Row) -> list[str]:
        """The continuations to choose from; for generation and text, the answer to learn."""
        if self.kind == "classification":
            return list(self.words.values())
        return row["choices"] if self.kind == "choice" else row["answers"][:1]

    def golds(self, row: Row) -> list[int]:
        """The indices in `choices` that are right."""
        if self.kind == "classification":
            return [list(self.words).index(str(row[self.label]))]
        if self.kind == "choice":
            label = row[self.label]
            return label if isinstance(label, list) else [int(label)]
        return [0]

    def _check_answer(self, row: Row) -> None:
        if self.kind == "classification" and str(row[self.label]) not in self.words:
            labels = ", ".join(map(repr, self.words))
            raise UserError(f"column {self.label!r}: {row[self.label]!r} is none of the labels {labels}")
        choices, golds = self.choices(row), self.golds(row)
        if not isinstance(choices, list):
            raise UserError(f"expected a list of answers, found {type(choices).__name__}")
        if not all(isinstance(text, str) and (text.strip() or not self.answered) for text in choices):
            raise UserError("an answer is empty or no text")
        if not golds or not all(0 <= gold < len(choices) for gold in golds):
            raise UserError("the answer is none of the choices")


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template names. Raises UserError if it names none or is broken."""
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}; a brace that is text is written twice") from error
    names = [str(name) for _, name, _, _ in fields]
    if not names or not all(names):
        raise UserError(f"template {template!r}: name the columns to show, such as {{text}}")
    for _, name, form, conversion in fields:
        if form or conversion:
            raise UserError(f"template {template!r}: columns are shown as they are; write {{{name}}}")
    return tuple(names)


def as_text(value: Any, column: str) -> str:
    """`value`, which `column` holds, as text. Raises UserError if it is neither text nor a number."""
    if value is None or value != value:  # NaN, as pandas writes what is missing
        raise UserError(f"column {column!r} holds {'null' if value is None else 'NaN'}, not text")
    if not isinstance(value, str | int | float):
        raise UserError(f"column {column!r} holds {type(value).__name__}, not text")
    return str(value)


def join(prompt: str, answer: str) -> str:
    """The prompt and what follows it, with one space between them unless there is a line break.

    The space then belongs to the answer's first token, as tokenizers have it inside a text, and never to the
    prompt's last. An empty prompt needs none.
    """
    if not prompt or prompt.endswith("\n") or answer.startswith("\n"):
        return prompt + answer
    return f"{prompt.rstrip(' ')} {answer.lstrip(' ')}"


def task_names() -> list[str]:
    """The names of the built-in tasks, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))


def load_task(name: str) -> Task:
    """The built-in task of that name. Raises UserError if there is none."""
    names = task_names()
    if name not in names:
        raise UserError(f"unknown task {name!r}; {near_miss(name, names)}")
    return importlib.import_module(f"{tasks.__name__}.{name}").TASK
