"""Loading runs no code that comes with what is loaded."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zoft.train.checkpoints import seal

from .conftest import Outcome
from .test_bad_input import assert_refused


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self._mark)!r}, 'w')",))


def test_payload(tmp_path: Path) -> None:
    """It works: what follows would show it."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").is_file()


def test_code_beside_a_model(zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    assert_refused(zoft("eval", folder, "--task", "sst2", "--data", data), "cannot load model")
    assert not mark.exists()


def test_pickled_weights(zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(mark)}, folder / "pytorch_model.bin")
    assert_refused(zoft("eval", folder, "--task", "sst2", "--data", data), "cannot load model")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_pickles_in_a_checkpoint(
    name: str, train: Callable[..., Outcome], zoft: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Even if its seal has been made anew."""
    assert train("--method", "zo-act", "--save-steps", 4, "--train-examples", 20).code == 0
    checkpoint, mark = tmp_path / "run" / "checkpoint-4", tmp_path / "mark"
    torch.save({"state": Payload(mark)}, checkpoint / name)
    run = json.loads((checkpoint / "seal.json").read_text())["run"]
    (checkpoint / "seal.json").unlink()
    seal(checkpoint, run)
    outcome = zoft("train", "--resume", tmp_path / "run", "--steps", 6)
    assert not mark.exists()
    if name != "training_args.bin":  # which nothing reads
        assert_refused(outcome, "checkpoint-4")


@pytest.mark.parametrize("relative", [True, False])
def test_a_resumed_run_stays_in_its_folder(
    relative: bool,
    train: Callable[..., Outcome],
    zoft: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Whatever its settings, or its checkpoint, say."""
    out = tmp_path / "here" / "run"
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    name = "../elsewhere" if relative else str(tmp_path / "elsewhere")
    assert train("--method", "zo-act", "--save-steps", 4, "--train-examples", 20, out=out).code == 0
    config, state = out / "config.yaml", out / "checkpoint-4" / "trainer_state.json"
    config.write_text(config.read_text().replace(f"out: {out}", f"out: {name}"))
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": name}))
    (out / "checkpoint-4" / "seal.json").unlink()
    kept = {path for path in tmp_path.rglob("*") if out not in path.parents}
    assert zoft("train", "--resume", out, "--steps", 8).code == 0
    assert zoft("replay", out).code == 0
    assert {path for path in tmp_path.rglob("*") if out not in path.parents} == kept
    assert (out / "checkpoint-8").is_dir()
