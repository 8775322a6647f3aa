"""What ``zoft train`` notices, and ``--guard``: going back from a divergence with a smaller learning rate."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoft.train.assemble
from train.tiny import TOKENIZER, make_model
from zoft.train.watch import Watch

from .conftest import Outcome
from .test_train import LEARNING_RATES

ABSURD = [("lozo", 0.1), ("agzo", 1e30), ("zo-act", 1e30), ("mezo", 0.1), ("fo-sgd", 10), ("lora", 1e3)]


def lines(out: Path, key: str) -> list[tuple[int, Any]]:
    """What the log has under `key`, with the steps."""
    texts = (out / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line[key]) for line in map(json.loads, texts) if key in line]


@pytest.mark.filterwarnings("error::zoft.optim.EstimateWarning")  # said by zoft, not by Python
@pytest.mark.parametrize(("method", "lr"), ABSURD)
def test_divergence_is_said_once(method: str, lr: float, train: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = train("--method", method, "--lr", lr, "--eval-steps", 60, steps=60)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("training diverges") == 1
    [(_, warning)] = lines(tmp_path / "run", "warning")
    assert f"--lr {lr / 3:.2g}" in warning and "--guard" in warning and warning in outcome.out
    assert not lines(tmp_path / "run", "guard")


@pytest.mark.parametrize("method", ["agzo", "zo-act", "guided", "mezo", "fo-adamw"])
def test_nothing_is_said_of_a_normal_run(method: str, train: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = train("--method", method, "--lr", LEARNING_RATES[method], "--eval-steps", 75, "--guard", steps=75)
    assert outcome.code == 0, outcome.err
    assert "diverges" not in outcome.out and "start again" not in outcome.out
    assert not lines(tmp_path / "run", "warning") and not lines(tmp_path / "run", "guard")
    assert not (tmp_path / "run" / "initial").exists()


@pytest.mark.parametrize(("method", "lr", "schedule"), [("lozo", 0.09, "linear"), ("fo-adamw", 10, "constant")])
def test_guard(method: str, lr: float, schedule: str, train: Callable[..., Outcome], tmp_path: Path) -> None:
    """It ends no worse than it began, by steps whose learning rates are the schedule's, cut by three at each event.

    How much better is luck, which differs between processors: of six held-out rows, after the steps that were left.
    """
    (tmp_path / "every.yaml").write_text("log_steps: 1")
    flags = ("--method", method, "--lr", lr, "--schedule", schedule, "--config", tmp_path / "every.yaml")
    outcome = train(*flags, "--eval-steps", 20, "--guard", steps=100)
    assert outcome.code == 0, outcome.err
    out = tmp_path / "run"
    events = lines(out, "guard")
    assert outcome.out.count("training diverges") == len(events) > 0
    for number, (_, event) in enumerate(events):
        place, _, rates = event.partition(", lr ")
        assert re.fullmatch(r"back to (the start|step \d+)", place)  # the best so far, if there is one
        assert rates == f"{lr / 3**number:.2g} -> {lr / 3 ** (number + 1):.2g}"
    for step, rate in lines(out, "learning_rate"):
        cuts = sum(at < step for at, _ in events)
        assert rate == pytest.approx(lr / 3**cuts * (1 - (step - 1) / 100 if schedule == "linear" else 1))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 100
    assert summary["forwards"] == (200 if method != "fo-adamw" else 300)
    assert summary["best_dev"] >= lines(out, "eval_accuracy")[0][1]
    losses = [math.inf if loss is None else loss for _, loss in lines(out, "loss")]  # on some processors not finite
    assert max(losses) > 1_000 and max(losses[-10:]) < 2
    if method == "fo-adamw":
        start, *_, kept = (loss for _, loss in lines(out, "validation_loss"))
        assert kept < start
    assert not (out / "initial").exists()


@pytest.mark.parametrize("method", ["agzo", "zo-act", "fo-sgd"])
def test_guard_gives_up(method: str, train: Callable[..., Outcome], tmp_path: Path) -> None:
    """No third of this is small enough: the run ends after six divergences, with the model that it began with.

    What was evaluated as best on the way, a ruined model, is forgotten each time.
    """
    outcome = train("--method", method, "--lr", 1e30, "--eval-steps", 5, "--guard", steps=100)
    assert outcome.code == 0, outcome.err
    events = lines(tmp_path / "run", "guard")
    assert [step for step, _ in events] == [10, 20, 30, 40, 50, 60]
    assert [event.endswith("the run ends") for _, event in events] == [False] * 5 + [True]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 60
    assert len({loss for _, loss in lines(tmp_path / "run", "validation_loss")}) == 1


@pytest.mark.parametrize("method", ["agzo", "zo-act", "lora"])
def test_guard_goes_back_to_the_best_checkpoint(
    method: str, train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One step of an absurd learning rate, the 31st, ruins the model that was best after the 20th."""

    class Jump(Watch):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            super().on_step_end(args, state, control, **given)
            if state.global_step == 30:
                given["optimizer"].param_groups[0]["lr"] = 1e30

    monkeypatch.setattr(zoft.train.assemble, "Watch", Jump)
    assert train("--method", method, "--lr", 1e-3, "--eval-steps", 20, "--guard", steps=50).code == 0
    [(step, event)] = lines(tmp_path / "run", "guard")
    assert event == "back to step 20, lr 0.001 -> 0.00033"
    evaluated = dict(lines(tmp_path / "run", "eval_loss"))
    assert step == 41 and evaluated[41] == evaluated[20]
    assert evaluated[50] not in (None, evaluated[20])


def test_the_start_may_be_the_best(train: Callable[..., Outcome], tmp_path: Path) -> None:
    """A run that ends before it has diverged again ends with the state that it had gone back to."""
    summary = train("--method", "agzo", "--lr", 1e30, "--eval-steps", 15, "--guard", "--json", steps=15).json()
    assert summary["best_step"] == 10
    [(_, start), _, (_, kept)] = lines(tmp_path / "run", "validation_loss")
    assert kept == start


@pytest.mark.filterwarnings("error::zoft.optim.EstimateWarning")
def test_estimates_that_are_zero_are_said_once(train: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = train("--method", "agzo", "--eps", 1e-30, "--guard", "--eval-steps", 30, steps=30)
    assert outcome.code == 0, outcome.err
    [(step, warning)] = lines(tmp_path / "run", "warning")
    assert step == 10 and warning.endswith("larger --eps, such as 1e-29")
    assert outcome.out.count(warning) == 1
    assert not lines(tmp_path / "run", "guard")


@pytest.mark.parametrize(
    "eps, lr, remedy",
    [
        (1e-30, 1e-3, "in 3 of the last 3 steps. Better start again with a larger --eps, such as 1e-29"),
        (1e-3, 1e10, "in 2 of the last 3 steps. Better start again with .*, or with a third of .*, --lr 3.3e"),
    ],
)
def test_a_short_run_of_zero_estimates(
    eps: float, lr: float, remedy: str, train: Callable[..., Outcome], tmp_path: Path
) -> None:
    """It ends before there are as many steps as are looked at otherwise."""
    outcome = train("--method", "agzo", "--eps", eps, "--lr", lr, "--eval-steps", 3, steps=3)
    [(step, warning)] = lines(tmp_path / "run", "warning")
    assert step == 3 and re.search(remedy, warning)
    assert outcome.out.count(warning) == 1


def test_losses_that_are_never_finite(zoft: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    """No learning rate is to blame, and there is no good state to go back to."""
    broken, out = make_model(), tmp_path / "run"
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    TOKENIZER.save_pretrained(tmp_path / "broken")
    flags = ("--task", "sst2", "--data", data, "--batch-size", 8, "--device", "cpu", "--method", "agzo", "--out", out)
    outcome = zoft("train", tmp_path / "broken", *flags, "--steps", 30, "--guard", "--dtype", "bfloat16")
    assert outcome.code == 0, outcome.err
    [(step, warning)] = lines(out, "warning")
    assert step == 10 and "--dtype float32" in warning
    assert outcome.out.count(warning) == 1
    assert not lines(out, "guard")
