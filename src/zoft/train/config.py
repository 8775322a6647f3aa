"""The configuration of a run: one flat dataclass, read from YAML and flags, written back complete."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from zoft.data import (
    LIKELIHOOD,
    UNKNOWN,
    Task,
    custom_task,
    first_row,
    form_of,
    is_reward,
    load_reward,
    load_task,
    parse_words,
)
from zoft.errors import UserError, near_miss
from zoft.train.files import free_folder, write_text
from zoft.train.models import DTYPES, QUANTIZED, find_device
from zoft.train.offload import memory_size
from zoft.train.optimizers import AUTO, COEFFICIENTS, FIRST_ORDER, method_options, require_method, usual_schedule
from zoft.train.values import as_type

ComputeDtype = Literal["auto", "weights", "float32"]  # `zoft.train.arithmetic`
LOSS = "loss"
SAMPLES = 4  # answers drawn for a prompt
OWN_TASK = ("template", "words", "label", "metric")  # describe it
OF_TASK = ("objective", "max_new_tokens")  # mean something for one task
SCHEDULES = ("constant", "linear", "cosine", "polynomial", "inverse_sqrt")


@dataclass
class TrainConfig:
    """Everything that determines a run.

    None for `lr`, `eps` and `schedule` means the method's own default; no `out`, a new folder of ``runs/`` named after
    task and method. What is ``"auto"`` is settled once the model is there (`zoft.train.auto`). With `seconds`, training
    ends after so many seconds of its steps, if not after `steps` before, and evaluates then; with `eval_seconds`, every
    so many seconds as well. `objective` is what is trained for: the loss, a metric of the task, or a reward, which
    then is the first of its metrics; methods that take its slope draw so many `samples` of generated text a prompt.
    """

    model: str
    task: str | None = None
    data: str | None = None
    template: str | None = None
    words: str | None = None
    label: str | None = None
    metric: str | None = None

    objective: str = LOSS
    samples: int = SAMPLES
    method: str = AUTO
    lr: Literal["auto"] | float | None = None
    eps: Literal["auto"] | float | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    schedule: str | None = None
    warmup_steps: int = 0
    weight_decay: float = 0.0

    steps: int = 300
    seconds: float | None = None
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 0
    dtype: str = "auto"
    compute_dtype: ComputeDtype = "auto"
    device: str | None = None
    memory: str | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None

    train_examples: int | None = None
    dev_examples: int = 200
    eval_examples: int | None = None
    eval_batch_size: int = 32
    eval_steps: int = 50
    eval_seconds: float | None = None
    save_steps: int | None = None
    log_steps: int = 10
    guard: bool = False  # go back, and on with a smaller lr, if it diverges (`zoft.train.guard`)
    out: str = ""

    def __post_init__(self) -> None:
        require_method(self.method)
        if self.method != AUTO:
            self.method_options = method_options(self.method, self.method_options)
            own = {name: self.method_options.pop(name, None) for name in ("lr", "eps")}
            self.lr = own["lr"] if self.lr is None else self.lr
            self.eps = own["eps"] if self.eps is None else self.eps
            self.schedule = self.schedule or ("constant" if self.seconds else usual_schedule(self.method))
        elif self.method_options:
            first = next(iter(self.method_options))
            remedy = f"leave {first} out, or name the method, as in --method guided"
            raise UserError(f"method auto sets its options itself: {remedy}")
        self.out = self.out or str(free_folder(Path("runs") / f"{self.task or 'own'}-{self.method}"))
        self._check()

    @property
    def first_order(self) -> bool:
        """Whether the method is one of the references that need backpropagation."""
        return self.method in FIRST_ORDER

    @property
    def weights_dtype(self) -> str:
        """The dtype in which weights are held: first-order steps would vanish in half precision.

        Those of a LoRA do not: its adapter is in float32 whatever the weights beside it are.
        """
        return "float32" if self.first_order and self.method != "lora" else self.dtype

    @property
    def loading(self) -> dict[str, Any]:
        """How `zoft.train.models.load_model` is to load the model."""
        return {"dtype": self.weights_dtype, "device": self.device, "memory": self.memory}

    @property
    def autocast(self) -> bool:
        """Whether to compute in bfloat16 with float32 weights, as is usual for first-order methods."""
        half = self.dtype in ("auto", "bfloat16", *QUANTIZED) and self.compute_dtype != "float32"
        return self.first_order and half

    def load_task(self, learned: bool = True) -> Task:
        """The task named by `task`, or the one that `template`, `words` and `label` describe.

        Where answers are not `learned`, as where a reward is the objective, rows need none if a reward measures.
        """
        reward = self.objective if is_reward(self.objective) else None
        if self.task is not None:
            own = [name for name in OWN_TASK if getattr(self, name) is not None]
            if own:
                raise UserError(f"{own[0]} describes your own task: leave it out, or leave out task {self.task!r}")
            task = load_task(self.task)
        else:
            words = parse_words(self.words) if self.words is not None else None
            answered = (learned and reward is None) or not is_reward(self.metric or reward or "")
            form = "answer" if self.data is None else form_of(first_row(self.data))
            task = custom_task(self.template, words, self.label, self.metric or reward, answered, form)
        if reward not in (None, task.metric):
            if task.kind == "text":
                raise UserError(f"objective {reward} needs generated answers; metric {task.metric} generates none")
            task = dataclasses.replace(task, metric=reward, also=(task.metric, *task.also))
        new = self.max_new_tokens
        if new is not None and task.kind != "generation":
            raise UserError(f"max_new_tokens is of generated answers; {task.title} has none")
        if new is None and self.objective != LOSS and task.max_new_tokens is None:
            new = UNKNOWN  # answers are not learned from the rows'
        if new is not None:
            task = dataclasses.replace(task, max_new_tokens=new)
        for name in filter(is_reward, (task.metric, *task.also)):
            load_reward(name)  # what is wrong with it is said before a model is loaded
        return task

    def check_objective(self, task: Task) -> None:
        """Raises UserError if the objective is no metric of single examples, or lr or eps cannot be measured by it."""
        if self.objective == LOSS:
            return
        names = [LOSS, *(name for name in (task.metric, *task.also) if name not in ("matthews", LIKELIHOOD))]
        if self.objective not in names:
            raise UserError(f"unknown objective {self.objective!r} of {task.title}; {near_miss(self.objective, names)}")
        if self.method not in (AUTO, "guided", *FIRST_ORDER) and AUTO in (self.lr, self.eps):
            raise UserError(f"objective {self.objective} moves in steps: leave neither lr nor eps to auto")

    def save(self, path: Path) -> None:
        """Write every field as YAML."""
        write_text(path, yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: Path | None, **flags: Any) -> TrainConfig:
        """`flags` that are not None, over the file `path`, over the defaults.

        Of the file, what describes another task or belongs to another method than the flags name gives way.

        Raises:
            UserError: the file cannot be read, or a value is unknown, of the wrong type, or out of its range.
        """
        values = read_yaml(path) if path is not None else {}
        known, where = get_type_hints(cls), f" in {path}" if path is not None else ""
        for name in values:
            if name not in known:
                raise UserError(f"unknown setting {name!r}{where}; {near_miss(name, known)}")
        away = _giving_way(values, flags)
        values = {name: value for name, value in values.items() if value is not None and name not in away}
        options = as_type("method_options", values.get("method_options", {}), dict) | flags.pop("method_options", {})
        values |= {name: value for name, value in flags.items() if value is not None}
        for name in {"lr", "eps"} & options.keys() & values.keys():
            raise UserError(f"{name} is given twice: leave it out of the method's options")
        values = {name: as_type(name, value, known[name]) for name, value in values.items()}
        if not values.get("model"):
            raise UserError("no model: name one, such as demo, a hub id, a folder or a .gguf file")
        if not values.get("task") and not values.get("data"):
            raise UserError("no task: give --task NAME (see zoft tasks), or your own with --data FILE")
        return cls(**{**values, "method_options": options})

    def _check(self) -> None:
        at_least = {"steps": 1, "batch_size": 1, "accumulate": 1, "dev_examples": 1, "eval_batch_size": 1}
        at_least |= {"eval_steps": 1, "log_steps": 1, "warmup_steps": 0, "seed": 0, "save_steps": 1}
        at_least |= {"samples": 2, "train_examples": 1, "eval_examples": 1, "max_length": 8, "max_new_tokens": 1}
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"{name} must be at least {lowest}, not {value}")
        if find_device(self.device).index:
            raise UserError(f"device {self.device!r}: training uses the first device; hide the others from it")
        if self.memory is not None:
            memory_size(self.memory)
            if self.first_order:
                raise UserError(f"{self.method} needs all weights in place: leave memory out")
        if self.seed >= 2**32:
            raise UserError(f"seed must be below 2**32, not {self.seed}")
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}; {near_miss(self.dtype, DTYPES)}")
        if self.dtype in QUANTIZED and self.method not in (AUTO, *COEFFICIENTS, "lora"):
            raise UserError(
                f"method {self.method} writes weights, and {self.dtype} ones cannot be: take {', '.join(COEFFICIENTS)}"
            )
        if self.schedule not in (*SCHEDULES, None):
            raise UserError(f"unknown schedule {self.schedule!r}; {near_miss(self.schedule, SCHEDULES)}")
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, str | None) and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be a number of at least 0, not {value}")
        for name in ("seconds", "eval_seconds"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be a number above 0, not {value}")
        if self.seconds is not None and self.schedule not in ("constant", None):
            raise UserError(f"a {self.schedule} schedule needs the number of steps, which seconds leaves open")
        if self.schedule == "polynomial" and self.lr == 0:
            raise UserError("a polynomial schedule falls to 0, from an lr above it")
        if self.eps == 0:
            raise UserError("eps must be above 0: it is the distance at which the loss is probed")
        if self.save_steps is not None and self.save_steps % self.eval_steps:
            raise UserError(
                f"save_steps ({self.save_steps}) must be a multiple of eval_steps ({self.eval_steps}), "
                "so that the best evaluated model is among the saved ones"
            )


def _giving_way(values: dict[str, Any], flags: dict[str, Any]) -> set[str]:
    """Which `values` of a file are not meant for the task or the method that `flags` name instead of its own."""

    def other(name: str) -> bool:
        return flags.get(name) is not None and name in values and flags[name] != values[name]

    found: set[str] = set()
    if other("task"):
        found |= {*OWN_TASK, *OF_TASK, "data"}
    elif flags.get("template") is not None and values.get("task") is not None:
        found |= {*OF_TASK, "task"}
    if other("method"):
        found |= {"method_options", "lr", "eps", "schedule"}
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if there is none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 99th of a month, for instance
        raise UserError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"config file {path} holds no settings of the form name: value")
    return values
