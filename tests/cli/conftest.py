import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from forks import ended
from train.tiny import TOKENIZER, make_model, reviews
from zoft.bench import process
from zoft.cli import main
from zoft.train import assemble
from zoft.train.callbacks import RunLog


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one object on standard output, which holds nothing else."""
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def zoft(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command line in this process."""

    def run(*args: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["zoft", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        code = stopped.value.code
        return Outcome(code if isinstance(code, int) else 0, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``zoft bench`` starts are processes that have imported zoft already."""
    monkeypatch.setattr(process, "_ended", ended)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of sst2."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", reviews(30))
    write_rows(folder / "validation.jsonl", reviews(21))
    return folder


@pytest.fixture
def write() -> Callable[[Path, list[dict[str, Any]]], Path]:
    """Writes rows as JSON lines."""
    return write_rows


@pytest.fixture
def train(zoft: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Trains the tiny model for a few steps on the rows of sst2, into ``tmp_path / "run"`` unless told otherwise."""

    def run(*args: object, out: Path = tmp_path / "run", steps: int = 4) -> Outcome:
        few = ["--steps", steps, "--eval-steps", 2, "--batch-size", 8, "--dtype", "float32", "--device", "cpu"]
        return zoft("train", model, "--task", "sst2", "--data", data, *few, "--out", out, *args)

    return run


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the user press Ctrl-C after a step, once."""

    def after(step: int) -> None:
        class Interrupted(RunLog):
            def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                super().on_step_end(args, state, control, **given)
                if state.global_step == step:
                    monkeypatch.setattr(assemble, "RunLog", RunLog)
                    raise KeyboardInterrupt

        monkeypatch.setattr(assemble, "RunLog", Interrupted)

    return after
