from pathlib import Path

import pytest
from report_runs import LINES, training_line

from zoft.errors import UserError
from zoft.report import read_run


def test_reads_every_file(make_run):
    run = read_run(make_run())
    assert len(run.training) == 30
    assert [line["eval_accuracy"] for line in run.evaluations] == [0.54, 0.62, 0.735, 0.70]
    assert run.config["method_options"]["rank"] == 1
    assert run.results["best"] == 0.719
    assert run.examples[0]["answer"] == "great"


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_no_run(tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"{name}.*zoft train") as raised:
        read_run(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_broken_summary(make_run):
    folder = make_run()
    (folder / "summary.json").write_text('{"task": ')
    with pytest.raises(UserError, match=r"summary\.json"):
        read_run(folder)


@pytest.mark.parametrize("torn", [b'{"step": 310, "forw', b'{"step": 310, "loss": "\xc3', b"31"])
def test_a_torn_line_is_left_out(make_run, torn: bytes):
    folder = make_run()
    with (folder / "metrics.jsonl").open("ab") as log:
        log.write(torn)
    assert len(read_run(folder).training) == 30


def test_steps_done_again_after_a_resume_count_once(make_run):
    run = read_run(make_run(lines=[*LINES, training_line(290, loss=0.25), training_line(300, loss=0.5)]))
    assert [line["step"] for line in run.training] == list(range(10, 301, 10))
    assert [line["loss"] for line in run.training[-2:]] == [0.25, 0.5]


def test_an_unfinished_run_is_told_from_its_log(make_run):
    run = read_run(make_run(summary=None))
    assert run.summary is None
    assert run.metric == "accuracy"
    expected = {"task": "sst2", "method": "agzo", "steps": 300, "forwards": 600, "seconds_per_step": 0.5}
    expected |= {"initial": 0.54, "final": 0.70, "best": 0.735}
    assert expected.items() <= run.results.items()


def test_an_unfinished_run_for_a_reward_is_measured_by_it(make_run):
    lines = [line | {"eval_rewards.py:length": 3.5} for line in LINES if "eval_loss" in line]
    for line in lines:
        del line["eval_accuracy"]
    assert read_run(make_run(summary=None, lines=lines)).metric == "rewards.py:length"
