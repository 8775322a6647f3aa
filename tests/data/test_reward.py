"""Rewards: metrics of the user's own, called as TRL calls its reward functions."""

from pathlib import Path

import pytest
import trl.rewards

from zoft.data import custom_task, load_reward, load_task, score, score_each
from zoft.errors import UserError

FUNCTIONS = """
SEEN = []
def length(prompts, completions, **columns):
    SEEN.append((prompts, completions, columns))
    return [len(text) for text in completions]
def some(completions, **_): return [None if not text else 1 for text in completions]
def short(completions, **_): return [1.0]
def words(completions, **_): return completions
def broken(completions, **_): return [text["content"] for text in completions]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(FUNCTIONS)
    return path


def test_a_reward_is_called_once_with_prompts_completions_and_columns(file: Path) -> None:
    task = custom_task(metric=f"{file}:length")
    rows = [task.read({"prompt": f"say {i}", "completion": "x", "level": i}) for i in range(2)]
    assert score(task, ["a", "abc"], rows) == {f"{file}:length": 2.0}
    ((prompts, completions, columns),) = load_reward(f"{file}:length").__globals__["SEEN"]
    assert prompts == ["say 0", "say 1"] and completions == ["a", "abc"]
    assert columns == {"level": [0, 1], "answers": [["x"], ["x"]]}


def test_each_example_has_its_own(file: Path) -> None:
    squad = load_task("squad")
    row = squad.read({"title": "t", "context": "c", "question": "q", "answers": {"text": ["one"]}})
    assert score_each(squad, "f1", ["one", "two", "one two"], [row] * 3) == pytest.approx([1, 0, 2 / 3])
    assert score_each(squad, f"{file}:length", ["one\nmore", ""], [row] * 2) == [3, 0]  # up to the task's stop
    assert score_each(squad, f"{file}:some", ["one", ""], [row] * 2) == [1, 0]
    sst2 = load_task("sst2")
    row = sst2.read({"sentence": "fine", "label": 1})
    assert score_each(sst2, f"{file}:length", [0, 1], [row] * 2) == [len("terrible"), len("great")]
    assert score_each(sst2, "accuracy", [0, 1], [row] * 2) == [0, 1]


def test_it_may_lie_in_a_module() -> None:
    assert load_reward("trl.rewards:think_format_reward") is trl.rewards.think_format_reward


def test_a_row_may_come_without_an_answer() -> None:
    assert custom_task(answered=False).read({"prompt": "x"})["answers"] == [""]
    assert custom_task(answered=False).read({"prompt": "x", "completion": "y"})["answers"] == ["y"]


def test_what_it_prints_goes_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once it was in the midst of what --json prints."""
    file = tmp_path / "rewards.py"
    file.write_text("print('read')\ndef one(completions, **_):\n    print('called')\n    return [1]\n")
    task = custom_task(metric=f"{file}:one")
    score(task, ["a"], [task.read({"prompt": "x", "completion": "y"})])
    assert capsys.readouterr() == ("", "read\ncalled\n")


@pytest.mark.parametrize(
    "name, said",
    [
        ("nowhere.py:f", "FileNotFoundError"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("{file}:lenght", "has no function 'lenght'"),
        ("{file}:SEEN", "has no function 'SEEN'"),
        ("{file}:short", "it gave 1 rewards for 2 completions"),
        ("{file}:words", "could not convert string to float"),
        ("{file}:broken", r"TypeError: string indices must be integers.*rewards.py, line 9"),
    ],
)
def test_mistakes(name: str, said: str, file: Path) -> None:
    task = custom_task(metric=name.format(file=file))
    rows = [task.read({"prompt": "x", "completion": "y"})] * 2
    with pytest.raises(UserError, match=said):
        score(task, ["a", "b"], rows)
