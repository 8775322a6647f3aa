"""``zoft replay``: a run's model from the model it began with and its log alone."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from train.tiny import TOKENIZER, make_model
from zoft.train.steplog import STEP, read_log

from .conftest import Outcome
from .test_bad_input import assert_refused
from .test_guard import lines

FROM_NOISE = [
    ("mezo", "--lr", "1e-3", "-o", "probes=2"),
    ("lozo", "--lr", "1e-3", "--accumulate", "2", "-o", "renew_every=3"),
    ("lozo-m", "--lr", "1e-3", "-o", "normalise=true", "--schedule", "linear", "--dtype", "bfloat16"),
    ("lozo", "--lr", "1e-3", "-o", "per_example=true", "--weight-decay", "0.1"),
    ("zo-act", "--schedule", "cosine", "--accumulate", "2"),
    ("zo-act", "--lr", "1e-2", "-o", "probes=3", "-o", "leave_one_out=true", "-o", "rank=2"),
]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def assert_equal(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From here on a forward pass of the model fails."""

    def start() -> None:
        monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", lambda *_, **__: pytest.fail("a forward"))

    return start


@pytest.mark.parametrize("flags", FROM_NOISE, ids=" ".join)
def test_bit_for_bit(
    flags: tuple[str, ...],
    train: Callable[..., Outcome],
    zoft: Callable[..., Outcome],
    data: Path,
    no_forward: Callable[[], None],
    tmp_path: Path,
) -> None:
    """The last model of ten steps, and that after every checkpoint, without data."""
    out, rows = tmp_path / "run", tmp_path / "rows"
    shutil.copytree(data, rows)
    assert train("--method", *flags, "--data", rows, "--save-steps", 2, steps=6).code == 0
    shutil.rmtree(rows)
    no_forward()
    found = zoft("replay", out, "--json").json()
    assert (found["steps"], found["torn"], found["out"]) == (6, 0, str(out / "replayed-6"))
    assert_equal(out / "checkpoint-6", out / "replayed-6")
    best = json.loads((out / "summary.json").read_text())["best_step"]
    assert zoft("replay", out, "--to-step", best, "--out", tmp_path / "best").code == 0
    [kept] = [*out.glob("model"), *out.glob("adapter")]
    assert_equal(kept, tmp_path / "best")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "best").get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize("method", ["lozo", "zo-act"])
def test_an_adapter_gone_on_from(
    method: str, train: Callable[..., Outcome], zoft: Callable[..., Outcome], data: Path, tmp_path: Path
) -> None:
    assert train("--method", "zo-act", "--lr", "1e-2", out=tmp_path / "first").code == 0
    few = ("--task", "sst2", "--data", data, "--batch-size", 8, "--dtype", "float32", "--device", "cpu", "--steps", 4)
    few = (*few, "--eval-steps", 2, "--save-steps", 2, "--method", method, "--lr", "1e-3")
    assert zoft("train", tmp_path / "first", *few, "--out", tmp_path / "run").code == 0
    assert zoft("replay", tmp_path / "run").code == 0
    assert_equal(tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "replayed-4")


@pytest.mark.parametrize("flags", [("mezo", "--lr", "0.1"), ("zo-act", "--lr", "1e19"), ("lozo-m", "--lr", "0.1")])
def test_a_run_that_went_back(
    flags: tuple[str, ...], train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Steps that were undone are not taken; the others are those of the lower rate."""
    out = tmp_path / "run"
    assert train("--method", *flags, "--guard", "--eval-steps", 8, "--save-steps", 8, steps=40).code == 0
    assert lines(out, "guard")
    assert zoft("replay", out).code == 0
    assert_equal(out / "checkpoint-40", out / "replayed-40")


def test_a_torn_tail(train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train("--method", "mezo", "--save-steps", 2).code == 0
    log = out / "steps.bin"
    whole = log.read_bytes()
    log.write_bytes(whole[:-3])
    assert "torn" in zoft("replay", out).out
    assert not (out / "replayed-4").exists() and (out / "replayed-3").is_dir()
    log.write_bytes(whole + b"\0" * 100)  # as a crash of the machine may leave it
    assert zoft("replay", out, "--json").json()["torn"] == 100
    assert_equal(out / "checkpoint-4", out / "replayed-4")


@pytest.mark.parametrize(
    "flags, size",
    [
        (("mezo",), 39),
        (("agzo", "-o", "probes=3"), 39 + 2 * 8),
        (("lozo", "--accumulate", 2, "--train-examples", 16), 39 + 16),
        (("lozo", "-o", "per_example=true"), 39 - 8 + 8 * 8),
        (("guided",), 31),
    ],
)
def test_bytes_of_a_step(flags: tuple[object, ...], size: int, train: Callable[..., Outcome], tmp_path: Path) -> None:
    """As docs/reliability.md has them."""
    assert train("--method", *flags).code == 0
    records = [pair for pair in pairwise(read_log(tmp_path / "run" / "steps.bin").records) if pair[1].kind == STEP]
    assert [after.end - before.end for before, after in records] == [size] * 4


@pytest.mark.parametrize(
    "method, message",
    [
        ("agzo", "bases come from the activations"),
        ("aim-zo", "bases come from the activations"),
        ("guided", "computed from activations"),
        ("fo-adamw", "first-order"),
    ],
)
def test_methods_that_cannot_be_replayed(
    method: str, message: str, train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert train("--method", method, steps=2).code == 0
    assert_refused(zoft("replay", tmp_path / "run"), message, tmp_path / "run" / "replayed-2")


def test_another_model(zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(model, mine)
    few = ("--task", "sst2", "--data", data, "--batch-size", 8, "--device", "cpu", "--steps", 2, "--method", "mezo")
    assert zoft("train", mine, *few, "--out", out).code == 0
    assert zoft("replay", out).code == 0
    network = make_model()
    network.lm_head.weight.data[3, 5] += 1e-3
    network.save_pretrained(mine)
    other = tmp_path / "other"
    assert_refused(zoft("replay", out, "--out", other), "the weights of the model are not", other)


def test_refusals(train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path) -> None:
    """A step that is not there, a folder that is, a run or a log that is not, another method than the log's."""
    out, other = tmp_path / "run", tmp_path / "other"
    assert_refused(zoft("replay", tmp_path), "holds no run")
    assert train("--method", "mezo").code == 0
    assert_refused(zoft("replay", out, "--to-step", 5, "--out", other), "ends after step 4", other)
    assert_refused(zoft("replay", out, "--to-step", -1, "--out", other), "at least 0", other)
    assert_refused(zoft("replay", out, "--out", out / "model"), "is there already")
    log, config = out / "steps.bin", out / "config.yaml"
    whole, text = log.read_bytes(), config.read_text()
    config.write_text(text.replace("seed: 0", "seed: 1"))
    assert_refused(zoft("replay", out, "--out", other), "its seed was 0, and now is 1", other)
    config.write_text(text)
    log.write_bytes(whole.replace(b"zoftlog\x01", b"zoftlog\x02"))
    assert_refused(zoft("replay", out, "--out", other), "another version", other)
    log.write_bytes(b"")
    assert_refused(zoft("replay", out, "--out", other), "not a run log", other)
    log.unlink()
    assert_refused(zoft("replay", out, "--out", other), "cannot read the run log", other)
