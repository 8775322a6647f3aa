"""``--objective FILE.py:FUNCTION``: training for a reward of generated text, by probes or by answers drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Outcome
from .test_config import assert_same
from .test_objective import losses

REWARD = """
import re
def share(completions, **_):
    return [len(re.findall(r"[e-z]", text)) / (1 + len(text)) for text in completions]
"""


@pytest.fixture
def reward(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(REWARD)
    return f"{tmp_path / 'rewards.py'}:share"


@pytest.fixture
def prompts(write: Callable[[Path, list[dict[str, Any]]], Path], tmp_path: Path) -> Path:
    """Prompts and nothing else."""
    return write(tmp_path / "prompts.jsonl", [{"prompt": f"{word} It was"} for word in ("fine", "dull", "tea") * 8])


def test_training_for_a_reward(
    zoft: Callable[..., Outcome], model: Path, reward: str, prompts: Path, tmp_path: Path
) -> None:
    """It is what the loss, the checkpoint kept and the summary go by; the run knows it again."""
    out, population = tmp_path / "run", ("-o", "probes=4", "-o", "leave_one_out=true", "-o", "shape=rank")
    summary = zoft(
        "train", model, "--data", prompts, "--objective", reward, "--method", "zo-act", "--eps", "1", "--lr", "0.3",
        *population, "--steps", 4, "--eval-steps", 2, "--batch-size", 4, "--out", out, "--json",
    ).json()  # fmt: skip
    assert summary["metric"] == reward
    assert summary["best_dev"] > summary["initial_dev"]
    assert all(0 <= loss < 1 for loss in losses(out))
    found = zoft("eval", out, "--metric", reward, "--json").json()
    assert found[reward] == pytest.approx(summary["best"], abs=1e-6)
    refused = zoft("eval", out)
    assert refused.code == 2 and f"add --metric {reward}" in refused.err
    page = (out / "report.html").read_text()
    assert "rewards.py:share" in page and "✗ wrong" not in page


@pytest.mark.parametrize("method, lr, forwards", [("guided -o attention=true", "0.05", 40), ("fo-adamw", "0.01", 60)])
def test_answers_drawn_lead_to_the_reward(
    method: str,
    lr: str,
    forwards: int,
    zoft: Callable[..., Outcome],
    model: Path,
    reward: str,
    prompts: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    summary = zoft(
        "train", model, "--data", prompts, "--objective", reward, "--method", *method.split(), "--lr", lr,
        "--steps", 20, "--eval-steps", 10, "--batch-size", 8, "--max-new-tokens", 6, "--out", out, "--json",
    ).json()  # fmt: skip
    assert summary["forwards"] == forwards
    assert summary["best_dev"] > summary["initial_dev"] + 0.05
    found = losses(out)
    assert found[-1] < found[0] - 0.02


def test_prompts_alone_can_be_measured(zoft: Callable[..., Outcome], model: Path, reward: str, prompts: Path) -> None:
    """What a model is worth before it is trained; once rows had to have an answer all the same."""
    measure = ("eval", model, "--data", prompts, "--metric", reward, "--max-new-tokens", 3)
    assert 0 <= zoft(*measure, "--json").json()[reward] < 1
    refused = zoft(*measure, "--shots", 2)  # which are shown with their answers
    assert refused.code == 2 and "no column 'completion'" in refused.err


def test_a_resumed_run_draws_what_it_would_have_drawn(
    zoft: Callable[..., Outcome],
    interrupt: Callable[[int], None],
    model: Path,
    reward: str,
    prompts: Path,
    tmp_path: Path,
) -> None:
    outs = [tmp_path / name for name in ("whole", "resumed")]
    flags = ["--objective", reward, "--lr", "0.01", "--steps", 6, "--eval-steps", 2, "--save-steps", 2]
    flags += ["--batch-size", 4, "--max-new-tokens", 4, "--samples", 2]
    assert zoft("train", model, "--data", prompts, *flags, "--out", outs[0]).code == 0
    interrupt(3)
    assert zoft("train", model, "--data", prompts, *flags, "--out", outs[1]).code != 0
    assert zoft("train", "--resume", outs[1]).code == 0
    assert_same(*outs)


def test_of_a_task_it_is_the_first_metric(
    zoft: Callable[..., Outcome], model: Path, data: Path, reward: str, tmp_path: Path
) -> None:
    done = zoft(
        "train", model, "--task", "sst2", "--data", data, "--objective", reward, "--method", "agzo", "--eps", "0.3",
        "--steps", 2, "--batch-size", 4, "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert list(done.json()["metrics"]) == [reward, "accuracy"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--objective", "rewards.py:share"), "rewards.py:share: FileNotFoundError"),
        (("--objective", "REWARD", "--method", "agzo", "--lr", "auto"), "neither lr nor eps to auto"),
        (("--metric", "REWARD", "--method", "zo-act"), "no column 'completion'"),
    ],
)
def test_mistakes(
    flags: tuple[str, ...],
    said: str,
    zoft: Callable[..., Outcome],
    model: Path,
    reward: str,
    prompts: Path,
    tmp_path: Path,
) -> None:
    given = [reward if flag == "REWARD" else flag for flag in flags]
    done = zoft("train", model, "--data", prompts, *given, "--out", tmp_path / "run")
    assert done.code == 2 and said in done.err
