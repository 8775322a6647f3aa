"""A suite of accuracy runs, declared in YAML: which methods, on which tasks, at what cost.

What `zoft train` takes as a setting may stand at the top of the file, at a task, or at a method; the later goes over
the former. The rest is described at `Suite`, `TaskPlan` and `Method`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zoft.bench.rates import grid_index, rate_name
from zoft.data import load_task
from zoft.errors import UserError, near_miss
from zoft.optim import Loss, cross_entropy
from zoft.train.config import TrainConfig, read_yaml
from zoft.train.optimizers import FIRST_ORDER, PATTERNS, method_options, require_method, zero_order
from zoft.train.values import as_type

ZERO_SHOT = "zero-shot"
HINTS = get_type_hints(TrainConfig)
# What the suite decides itself, or has no use for; everything else that `zoft train` takes is a setting.
DECIDED = {"model", "task", "template", "words", "label", "metric", "method", "method_options", "lr", "seed"}
DECIDED |= {"steps", "seconds", "eval_steps", "eval_seconds", "save_steps", "out"}
SETTINGS = [name for name in HINTS if name not in DECIDED]
EVAL_FLAGS = {  # settings that `zoft eval` takes
    "eval_examples": "--examples",
    "eval_batch_size": "--batch-size",
    "max_length": "--max-length",
    "dtype": "--dtype",
    "device": "--device",
}
SEARCH = bool | str
ENDLESS = 10**7  # steps: more than fit in any budget of seconds


@dataclass(frozen=True)
class Budget:
    """The cost of one run: one of forwards (a step's own count each), seconds of training, or steps."""

    forwards: int | None = None
    seconds: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class TaskPlan:
    """How runs on one task differ from those on others."""

    seeds: tuple[int, ...]
    budget: Budget
    evaluations: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A row of the table: a method of `zoft train` and its first learning rate, or `shots` rows in the prompt.

    With `search`, the learning rate is sought around `lr`, on each task, or once on the task that it names.
    `forwards_per_step` are those of one batch.
    """

    method: str = ""
    shots: int | None = None
    lr: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    search: bool | str = False
    forwards_per_step: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def first_order(self) -> bool:
        """Whether it backpropagates."""
        return self.method in FIRST_ORDER


@dataclass(frozen=True)
class Cell:
    """One run. `settings` is everything that determines it, but for the folder of all data.

    `rate` is None for what needs no training, `step_cost` the forwards that a step counts as, where it is not
    zeroth-order and they are counted.
    """

    task: str
    row: str
    rate: str | None
    seed: int
    settings: dict[str, Any]
    step_cost: int | None

    @property
    def name(self) -> str:
        """``TASK/METHOD/lrRATE-sSEED``, also its path in the folder of results, without the suffix."""
        return f"{self.task}/{self.row}/{f'lr{self.rate}-' if self.rate else ''}s{self.seed}"


@dataclass(frozen=True)
class Suite:
    """Every row of `methods` on every one of `tasks`; the row ``zero-shot`` is always the first.

    max_rates: how many learning rates a search tries at most, the same for every method.
    """

    model: str
    tasks: dict[str, TaskPlan]
    methods: dict[str, Method]
    max_rates: int
    settings: dict[str, Any]

    def cell(self, task: str, row: str, rate: str | None, seed: int) -> Cell:
        """The run of a row on a task with one learning rate (None for those without training) and seed."""
        plan, method = self.tasks[task], self.methods[row]
        settings: dict[str, Any] = {"model": self.model, "task": task, "seed": seed}
        settings |= self.settings | plan.settings | method.settings
        if rate is None:
            kept = ("model", "task", "seed", "data", *EVAL_FLAGS)
            settings = {name: value for name, value in settings.items() if name in kept} | {"shots": method.shots}
            return Cell(task, row, rate, seed, settings, step_cost=0)
        accumulate = settings.get("accumulate", 1)
        settings |= {"method": method.method, "lr": float(rate), "method_options": method.options}
        settings |= self._length(plan, method.forwards_per_step * accumulate)
        step_cost = method.forwards_per_step * accumulate if method.first_order else None
        return Cell(task, row, rate, seed, settings, step_cost)

    def _length(self, plan: TaskPlan, forwards_per_step: int) -> dict[str, Any]:
        budget = plan.budget
        if budget.seconds is not None:
            endless = {"steps": ENDLESS, "eval_steps": ENDLESS}
            return endless | {"seconds": budget.seconds, "eval_seconds": budget.seconds / plan.evaluations}
        steps = budget.steps
        if budget.forwards is not None:
            steps = budget.forwards // forwards_per_step
        assert steps is not None
        return {"steps": steps, "eval_steps": max(1, steps // plan.evaluations)}


def counted_forwards(method: str, options: dict[str, Any]) -> int:
    """Forward passes of one batch's step of a zeroth-order method, counted on a tiny random model."""
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, tokens = LlamaForCausalLM(config).eval(), torch.arange(8).reshape(2, 4)
    of_this_model = {name: value for name, value in options.items() if name not in PATTERNS}
    optimizer = zero_order(method, model, method_options(method, of_this_model))

    def closure() -> Loss:
        loss = cross_entropy(model(tokens).logits, tokens)
        return loss._replace(values=loss.values.expand(len(tokens)))  # as of each example, for methods that ask for it

    optimizer.step(closure)  # the first may need one more, for a basis that is kept
    before = optimizer.counters.forwards
    optimizer.step(closure)
    return optimizer.counters.forwards - before


def load_suite(path: Path) -> Suite:
    """The suite in a YAML file.

    Raises:
        UserError: the file cannot be read, or a value is unknown, missing, of the wrong type, or out of its range.
    """
    values = read_yaml(path)
    with _at(str(path)):
        return _suite(values)


def _suite(values: dict[str, Any]) -> Suite:
    common = {"seeds": [0], "budget": None, "evaluations": 4}
    own, settings = _split(
        values, ("model", "tasks", "methods", "search", "max_rates", "first_order_forwards", *common)
    )
    for name in ("model", "tasks", "methods"):
        if not own.get(name):
            raise UserError(f"no {name}")
    common |= {name: own[name] for name in common if name in own}
    search = as_type("search", own.get("search", True), SEARCH)
    first_order = _count("first_order_forwards", own.get("first_order_forwards", 3))  # a backward counts as about two
    rows = {
        str(row): _method(str(row), given, search, first_order)
        for row, given in as_type("methods", own["methods"], dict).items()
    }
    suite = Suite(
        model=as_type("model", own["model"], str),
        tasks=_tasks(own["tasks"], common),
        methods={ZERO_SHOT: Method(shots=0)} | rows,
        max_rates=_count("max_rates", own.get("max_rates", 5), lowest=3),
        settings=settings,
    )
    for row, method in suite.methods.items():
        if isinstance(method.search, str) and method.search not in suite.tasks:
            raise UserError(f"method {row}: search must be true, false or a task of the suite, not {method.search!r}")
    for task, plan in suite.tasks.items():
        for row, method in suite.methods.items():
            if method.shots is None:
                with _at(f"{row} on {task}"):
                    given = suite.cell(task, row, rate_name(method.lr), plan.seeds[0]).settings
                    TrainConfig.load(None, **given, out="run")
    return suite


def _tasks(values: Any, common: Mapping[str, Any]) -> dict[str, TaskPlan]:
    plans: dict[str, TaskPlan] = {}
    for item in values if isinstance(values, list) else [values]:
        for name, given in item.items() if isinstance(item, dict) else [(item, {})]:
            load_task(as_type("task", name, str))
            if name in plans:
                raise UserError(f"task {name} is there twice")
            with _at(f"task {name}"):
                own, settings = _split(given, common)
                merged = {**common, **own}
                plans[name] = TaskPlan(
                    seeds=_seeds(merged["seeds"]),
                    budget=_budget(merged["budget"]),
                    evaluations=_count("evaluations", merged["evaluations"]),
                    settings=settings,
                )
    return plans


def _method(row: str, given: Any, search: bool | str, first_order_forwards: int) -> Method:
    if row == ZERO_SHOT or not re.fullmatch(r"\w[\w.+-]*", row):
        raise UserError(f"method {row!r}: choose a name of letters, digits and . + - _; {ZERO_SHOT} is always there")
    with _at(f"method {row}"):
        own, settings = _split(given, ("method", "shots", "lr", "options", "search", "forwards_per_step"))
        if "shots" in own:
            if stray := sorted(own.keys() - {"shots"}):
                raise UserError(f"shots are shown in the prompt and need no training: leave out {stray[0]}")
            return Method(shots=_count("shots", own["shots"], lowest=0), settings=settings)
        method = as_type("method", own.get("method", row), str)
        options = as_type("options", own.get("options", {}), dict)
        require_method(method)
        default = method_options(method, options)["lr"]
        lr = as_type("lr", own.get("lr", default), float)
        if not (math.isfinite(lr) and lr > 0):
            raise UserError(f"lr must be a number above 0, not {lr}")
        if search := as_type("search", own.get("search", search), SEARCH):
            grid_index(rate_name(lr))
        counted = own.get("forwards_per_step")
        if counted is None:
            counted = first_order_forwards if method in FIRST_ORDER else counted_forwards(method, options)
        return Method(method, None, lr, options, search, _count("forwards_per_step", counted), settings)


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = tuple(_count("seeds", seed, lowest=0) for seed in (value if isinstance(value, list) else [value]))
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be different numbers, at least one, not {value}")
    return seeds


def _budget(value: Any) -> Budget:
    kinds = get_type_hints(Budget)
    if not isinstance(value, dict) or len(value) != 1:
        raise UserError(f"budget must be one of {', '.join(kinds)}, such as {{forwards: 600}}, not {value!r}")
    [(kind, amount)] = value.items()
    if kind not in kinds:
        raise UserError(f"unknown budget {kind!r}; {near_miss(kind, kinds)}")
    amount = as_type(f"budget {kind}", amount, kinds[kind])
    if amount is None or not 0 < amount < math.inf:
        raise UserError(f"budget {kind} must be a number above 0, not {amount}")
    return Budget(**{kind: amount})


def _split(given: Any, known: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of `given` that are `known` here, and those that are settings of `zoft train`, checked."""
    values = as_type("what stands there", {} if given is None else given, dict)
    for name in values:
        if name not in known and name not in SETTINGS:
            raise UserError(f"unknown setting {name!r}; {near_miss(name, [*known, *SETTINGS])}")
    own = {name: value for name, value in values.items() if name in known}
    return own, {name: as_type(name, value, HINTS[name]) for name, value in values.items() if name not in known}


def _count(name: str, value: Any, lowest: int = 1) -> int:
    number = as_type(name, value, int)
    if number < lowest:
        raise UserError(f"{name} must be at least {lowest}, not {number}")
    return number


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Puts `place` before the message of a mistake found inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
