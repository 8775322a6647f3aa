"""Settings: flag over file over default, and a run's own file reproduces it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from zoft.errors import UserError
from zoft.train import TrainConfig

from .conftest import Outcome


def weights(out: Path) -> dict[str, torch.Tensor]:
    [file] = [*out.glob("model/*.safetensors"), *out.glob("adapter/*.safetensors")]
    return load_file(file)


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "agzo", "-o", "rank=2", "-o", "two_sided=true", "--lr", "1e-3", "--seed", "3"),
        ("--method", "zo-act", "-o", "exclude=*.mlp.*", "--accumulate", "2", "--schedule", "linear"),
        ("--method", "lora", "-o", "rank=2", "--lr", "1e-2"),
        ("--method", "auto"),
        ("--method", "zo-act", "--lr", "auto", "--eps", "auto"),
    ],
)
def test_config_reproduces_the_run(
    flags: tuple[str, ...], train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    assert train(*flags).code == 0
    assert zoft("train", "--config", run / "config.yaml", "--out", again).code == 0
    assert_same(run, again)
    assert train(*flags, "--seed", 9, out=tmp_path / "other").code == 0
    with pytest.raises(AssertionError):
        assert_same(run, tmp_path / "other")


def test_flag_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: m\ntask: sst2\nmethod: agzo\nsteps: 7\nlr: 1e-4\nmethod_options: {rank: 2, probes: 3}\n")
    config = TrainConfig.load(file, steps=5, method_options={"rank": 4})
    assert (config.steps, config.lr, config.batch_size) == (5, 1e-4, 16)
    assert config.method_options["rank"] == 4 and config.method_options["probes"] == 3
    assert (config.eps, config.method_options["two_sided"]) == (3e-3, False)


def test_what_belongs_to_the_files_method_gives_way_to_another(tmp_path: Path) -> None:
    """Once mezo was refused for agzo's options, or took its lr."""
    file = tmp_path / "config.yaml"
    TrainConfig.load(None, model="m", task="sst2", method="guided", lr=0.5, steps=7).save(file)
    config = TrainConfig.load(file, method="mezo")
    assert (config.steps, config.lr, config.eps, config.schedule) == (7, 1e-6, 1e-3, "constant")
    assert TrainConfig.load(file, method="guided").lr == 0.5
    file.write_text("model: m\ntask: sst2\nlr: 0.25\n")
    assert TrainConfig.load(file, method="mezo").lr == 0.25, "the file's lr is of no method"


def test_what_belongs_to_the_files_task_gives_way_to_another(tmp_path: Path) -> None:
    """Once a built-in task was refused for the words of the file's own, and the other way round."""
    file, own = tmp_path / "config.yaml", {"template": "{text} It was", "words": "0=bad,1=good", "label": "score"}
    TrainConfig.load(None, model="m", data="my.csv", **own).save(file)
    found = TrainConfig.load(file, task="sst2")
    assert (found.task, found.template, found.words, found.data) == ("sst2", None, None, None)
    assert TrainConfig.load(file, template="Is {text} good?").words == own["words"]
    TrainConfig.load(None, model="m", task="squad", data="folder", objective="f1", max_new_tokens=9).save(file)
    found = TrainConfig.load(file, **own)
    assert (found.task, found.data, found.objective, found.max_new_tokens) == (None, "folder", "loss", None)
    assert TrainConfig.load(file, task="squad").max_new_tokens == 9
    file.write_text("model: m\ndata: folder\n")
    assert TrainConfig.load(file, task="sst2").data == "folder", "the file says of no task"


def test_saved_config_is_complete(tmp_path: Path) -> None:
    config = TrainConfig.load(None, model="m", task="sst2", method="zo-act")
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()).keys() == TrainConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: m\ntask: sst2\nstesp: 3", "unknown setting 'stesp'.*did you mean steps"),
        ("model: m\ntask: sst2\n3: 3", "unknown setting 3"),
        ("model: m\ntask: sst2\nsteps: 2.5", "steps must be of type int, not 2.5"),
        ("model: m\ntask: sst2\nsteps: true", "steps must be of type int, not True"),
        ("model: m\ntask: sst2\nsteps: many", "steps must be of type int, not 'many'"),
        ("model: m\ntask: sst2\nlr: fast", "lr must be of type float"),
        ("model: m\ntask: sst2\nmethod_options: rank", "method_options must be of type dict"),
        (
            "model: m\ntask: sst2\nmethod: agzo\nmethod_options: {others: both}",
            "others must be one of frozen, gaussian",
        ),
        ("model: m\ntask: sst2\nmethod: agzo\nmethod_options: {include: 3}", "include must be of type list of str"),
        ("model: m\ntask: sst2\nseed: 5000000000", "seed must be below"),
        ("model: m\nsteps: 3", "no task"),
        ("task: sst2", "no model"),
        ("- model: m", "no settings of the form"),
        ("model: [m", "is not YAML"),
    ],
)
def test_bad_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        TrainConfig.load(file)


def test_null_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: m\ntask: sst2\nsteps: null\n")
    assert TrainConfig.load(tmp_path / "config.yaml").steps == 300


def test_own_task_and_built_in_task_do_not_mix() -> None:
    with pytest.raises(UserError, match="template describes your own task"):
        TrainConfig.load(None, model="m", task="sst2", template="{text} It was").load_task()
