"""A user's mistake: exit code 2, one line that says what to do, and nothing written."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import PartialState

from train.tiny import TOKENIZER, make_model, reviews

from .conftest import Outcome, write_rows


def assert_refused(outcome: Outcome, message: str, out: Path | None = None) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("zoft: ") and outcome.err.count("\n") == 1, outcome.err
    assert message in outcome.err
    assert out is None or not out.exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task", "bolq"], "did you mean boolq?"),
        (["--data", "no/such/place"], "no/such/place: no such file or folder"),
        (["--method", "agz"], "did you mean agzo?"),
        (["--method", "nothing-like-it"], "choose from auto, mezo, lozo"),
        (["--method", "agzo", "-o", "ranks=2"], "did you mean rank?"),
        (["-o", "rank=2"], "leave rank out, or name the method, as in --method guided"),
        (["-o", "rank"], "not of the form name=value"),
        (["--method", "agzo", "-o", "rank=0"], "rank"),
        (["--method", "agzo", "-o", "rank=abc"], "rank must be of type int, not 'abc'"),
        (["--method", "agzo", "-o", "rank=1.5"], "rank must be of type int, not 1.5"),
        (["--method", "agzo", "-o", "two_sided=maybe"], "two_sided must be of type bool"),
        (["--method", "agzo", "-o", "others=both"], "others must be one of frozen, gaussian"),
        (
            ["--method", "agzo", "-o", "probe_batching=x"],
            "probe_batching must be true or false or one of auto",
        ),
        (
            ["--method", "agzo", "-o", "include=no.such.*"],
            "a linear layer here is called 'model.layers.0.self_attn.q_proj'",
        ),
        (["--method", "lora", "-o", "rank=0"], "method lora"),
        (["--method", "agzo", "--lr", "1e-3", "-o", "lr=1e-4"], "lr is given twice"),
        (["--out", "x" * 300], "File name too long"),
        (["--method", "fo-sgd", "-o", "momentum=-1"], "method fo-sgd"),
        (["--steps", "0"], "steps must be at least 1, not 0"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--lr", "-1"], "lr must be a number of at least 0, not -1"),
        (["--lr", "nan"], "lr must be a number"),
        (["--lr", "fast"], "lr must be of type float, not 'fast'"),
        (["--eps", "auto", "--method", "guided"], "method guided, lr or eps auto: guided draws no directions"),
        (["--eps", "auto", "--method", "lora"], "lora is first-order"),
        (["--eps", "auto", "--batch-size", "16", "--method", "agzo"], "measured on at least two batches"),
        (["--eps", "0"], "eps must be above 0"),
        (["--weight-decay", "inf"], "weight_decay must be a number"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--dtype", "float31"], "did you mean float32?"),
        (["--schedule", "cosin"], "did you mean cosine?"),
        (["--schedule", "polynomial", "--lr", "0"], "a polynomial schedule falls to 0"),
        (["--device", "warp"], "no device 'warp'"),
        (["--device", "cuda:99"], "no device 'cuda:99'"),
        (["--save-steps", "3"], "multiple of eval_steps (2)"),
        (["--max-length", "4"], "max_length must be at least 8"),
        (["--max-length", "1000"], "the model takes 256 tokens"),
        (["--batch-size", "25"], "a batch of 25 is more than the 24 training rows"),
        (["--config", "no/such.yaml"], "cannot read config file no/such.yaml"),
        (["--words", "0=a,1=b"], "words describes your own task"),
    ],
)
def test_flag(flags: list[str], message: str, train: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(train(*flags), message, tmp_path / "run")


GOOD = [json.dumps(row) for row in reviews(20)]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "no labelled rows for train"),
        ([*GOOD, '{"text": "a film", "label": 1}'], "train.jsonl:21: no column 'sentence'"),
        ([*GOOD, '{"sentence": "a film"}'], "train.jsonl:21: no column 'label'"),
        ([*GOOD, '{"sentence": "a film", "label": 2}'], "train.jsonl:21: column 'label': 2 is none of the labels"),
        ([*GOOD, '{"sentence": "a film", '], "train.jsonl:21: broken JSON"),
        ([GOOD[0]], "cannot hold 1 rows out of 1"),
    ],
)
def test_data(lines: list[str], message: str, train: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(lines))
    write_rows(folder / "validation.jsonl", reviews(4))
    assert_refused(train("--data", folder), message, tmp_path / "run")


def test_data_folder_without_validation(train: Callable[..., Outcome], tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", reviews(20))
    assert_refused(train("--data", tmp_path), "no validation.jsonl", tmp_path / "run")


def test_question_that_does_not_fit(zoft: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "what is it? " * 5, "completion": "tea"} for _ in range(40)]
    file, out = write_rows(tmp_path / "my.jsonl", rows), tmp_path / "run"
    assert_refused(zoft("train", model, "--data", file, "--max-length", 20, "--out", out), "raise --max-length", out)


def damaged(model: Path, folder: Path, damage: Callable[[Path], Any]) -> Path:
    shutil.copytree(model, folder)
    damage(folder)
    return folder


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "config is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "config of no known model": lambda folder: (folder / "config.json").write_text('{"model_type": "nothing"}'),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "torn weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_model_folder(
    damage: Callable[[Path], Any], zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path
) -> None:
    folder, out = damaged(model, tmp_path / "model", damage), tmp_path / "run"
    assert_refused(zoft("train", folder, "--task", "sst2", "--data", data, "--out", out), str(folder), out)


def test_checkpoint_that_lacks_weights(zoft: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    network = make_model()
    state = {name: tensor for name, tensor in network.state_dict().items() if "layers.1." not in name}
    network.save_pretrained(tmp_path / "model", state_dict=state)
    TOKENIZER.save_pretrained(tmp_path / "model")
    outcome = zoft("eval", tmp_path / "model", "--task", "sst2", "--data", data)
    assert_refused(outcome, "lacks 9 weights of a causal language model")


@pytest.mark.parametrize("name", ["no/such/folder", "nothing", "./nothing", "nothing.gguf"])
def test_no_model(name: str, zoft: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert_refused(zoft("train", name, "--task", "sst2", "--data", data, "--out", out), name, out)


def test_nothing_to_do(zoft: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    assert_refused(zoft("train", "--task", "sst2", "--out", tmp_path / "run"), "no model", tmp_path / "run")
    assert_refused(zoft("train", model, "--out", tmp_path / "run"), "no task", tmp_path / "run")
    assert_refused(zoft("eval", model), "no task")
    assert_refused(zoft("align", model), "--task")


def test_out_holds_a_run(train: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("kept")
    assert_refused(train(), "holds a run already")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert (folder / "config.yaml").read_text() == "kept"


@pytest.mark.parametrize("taken", ["model", "checkpoint-500", "report.html"])
def test_out_holds_what_a_run_would_replace(taken: str, train: Callable[..., Outcome], tmp_path: Path) -> None:
    """Once the user's own model and checkpoints were deleted, as with ``--out .``."""
    folder = tmp_path / "run"
    (folder / taken).mkdir(parents=True)
    (folder / taken / "precious").write_text("kept")
    assert_refused(train(), f"holds {taken!r}, which a run would replace")
    assert [path.name for path in folder.iterdir()] == [taken]
    assert (folder / taken / "precious").read_text() == "kept"


def test_out_holds_other_files(train: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "my.jsonl").write_text("kept")
    assert train("--method", "agzo", steps=2).code == 0
    assert (folder / "my.jsonl").read_text() == "kept" and (folder / "model").is_dir()


def test_out_is_empty(
    zoft: Callable[..., Outcome], model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once the run was written into the folder that one was in, as where a script's variable is unset."""
    monkeypatch.chdir(tmp_path)
    assert_refused(zoft("train", model, "--task", "sst2", "--data", data, "--out", ""), "--out is empty")
    assert not [*tmp_path.iterdir()]


def test_out_under_a_file(train: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    assert_refused(train(out=tmp_path / "file" / "run"), "file")
    assert_refused(train(out=tmp_path / "file"), "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_disk_full(train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert_refused(train("--method", "agzo"), "of disk", tmp_path / "run")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device")]
)
def test_disk_full_on_the_way(error: Exception, train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("zoft.train.run.write_report", fail)
    assert_refused(train(), "No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
)
def test_memory_full(error: Exception, train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a traceback."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("zoft.train.run._fit", fail)
    assert_refused(train(), "lower --batch-size, --eval-batch-size or --max-length")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_folder_that_cannot_be_written(
    number: int, train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, "no", str(path))

    monkeypatch.setattr(Path, "mkdir", fail)
    assert_refused(train(), f"cannot write {tmp_path / 'run'}: no")


def test_resume_of_no_run(zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(zoft("train", "--resume", tmp_path), "holds no run")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--methods", "agzo,mezzo"], "did you mean mezo?"),
        (["--methods", "lora"], "first-order"),
        (["--methods", "auto"], "name the method"),
        (["--methods", ","], "names no method"),
        (["-o", "rank=0"], "rank"),
        (["-o", "rnak=2"], "did you mean rank?"),
        (["--eps", "0"], "eps must be above 0"),
        (["--batch-size", "40"], "need 120 rows; there are 30"),
        (["--task", "rtte"], "did you mean rte?"),
        (["--plot", "plot.xyz"], "plot.xyz"),
        (["--plot", "no/such/folder/plot.png"], "no/such/folder/plot.png"),
    ],
)
def test_align(flags: list[str], message: str, zoft: Callable[..., Outcome], model: Path, data: Path) -> None:
    few = ("--estimates", 2, "--batches", 3, "--batch-size", 2, "--methods", "agzo")
    assert_refused(zoft("align", model, "--task", "sst2", "--data", data, *few, *flags), message)


def test_half_a_launch(train: Callable[..., Outcome]) -> None:
    with patch.dict(os.environ, WORLD_SIZE="2"):  # accelerate adds to it
        PartialState._reset_state()
        assert_refused(train(), "Start several processes by torchrun; for one, unset WORLD_SIZE")
        PartialState._reset_state()


def test_report_of_no_run(zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(zoft("report", tmp_path), "metrics.jsonl")


@pytest.mark.parametrize(
    "command, message",
    [
        (["train", "--steps", 2], "no estimate so far had a finite loss"),
        (["train", "--method", "zo-act", "--lr", "auto"], "the loss is not finite: there is nothing to measure"),
        (["align", "--methods", "agzo,guided", "--estimates", 2, "--batches", 1], "the loss is not finite, and has no"),
        (["doctor", "--directions", 2], "the loss is not finite: there is nothing to measure"),
    ],
)
def test_weights_that_are_no_numbers(
    command: list[Any], message: str, zoft: Callable[..., Outcome], data: Path, tmp_path: Path
) -> None:
    broken: Any = make_model()
    broken.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    for part in (broken, TOKENIZER):
        part.save_pretrained(tmp_path / "broken")
    name, *own = command
    out = ["--out", tmp_path / "run"] if name == "train" else []
    done = zoft(name, tmp_path / "broken", "--task", "sst2", "--data", data, "--batch-size", 4, *own, *out)
    assert done.code == 2 and "Traceback" not in done.err and message in done.err.splitlines()[-1]
