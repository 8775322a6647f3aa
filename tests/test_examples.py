"""The scripts of examples/, each run as it is on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertModel

import zoft
from optim.models import changed, snapshot
from scripts import ROOT, load
from train.tiny import FAMILIES, TOKENIZER, build


def test_every_script_is_run_here() -> None:
    tests = Path(__file__).read_text()
    assert all(
        f"examples/{file.name}" in tests or f'"{file.stem}"' in tests for file in (ROOT / "examples").glob("*.py")
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random model and its tokenizer, as a user has it."""
    folder = tmp_path_factory.mktemp("tiny")
    build(FAMILIES["llama"]).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def test_plain_loop(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    losses = load("examples/plain_loop.py").main(tiny, steps=30)
    assert losses[-1] < losses[0]
    assert "with 60 forwards" in capsys.readouterr().out


def test_reward(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = load("examples/reward.py").main(tiny, steps=5)
    assert len(set(rewards)) > 1
    assert "with 45 generations" in capsys.readouterr().out


def test_accelerate_loop(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(load("examples/accelerate_loop.py").main(tiny)) == 8
    assert "steps=4, forwards=16, skipped=0, zero=0" in capsys.readouterr().out


def test_trainer(tiny: str, tmp_path: Path) -> None:
    trainer = load("examples/trainer.py").main(tiny, str(tmp_path))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    tokens = torch.arange(10).view(1, -1)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(adapted(tokens).logits, trainer.model.eval()(tokens).logits, atol=1e-5)


def test_classifier(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    encoder = BertModel(config)
    encoder.save_pretrained(tmp_path / "encoder")
    TOKENIZER.save_pretrained(tmp_path / "encoder")
    trainer = load("examples/classifier.py").main(str(tmp_path / "encoder"), str(tmp_path / "run"))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=2)
    adapted, tokens = PeftModel.from_pretrained(fresh, tmp_path / "run").eval(), torch.arange(10).view(1, -1)
    with torch.no_grad():
        assert torch.allclose(adapted(tokens).logits, trainer.model.eval()(tokens).logits, atol=1e-5)


def test_offload(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = load("examples/offload.py").main(tiny, str(tmp_path))
    assert losses[-1] < losses[0]
    assert "the weights loaded 20 times" in capsys.readouterr().out
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter")


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_trl(name: str, tiny: str, tmp_path: Path) -> None:
    trainer: zoft.ZOTrainer = load(f"examples/{name}.py").main(tiny, str(tmp_path))
    optimizer = trainer.zero_order
    assert optimizer is not None
    forwards = 20 if isinstance(optimizer, zoft.Guided) else 40
    assert (optimizer.counters.steps, optimizer.counters.forwards, optimizer.counters.zero) == (20, forwards, 0)
    if optimizer.keeps_coefficients:
        assert all(factor.any() for factor in optimizer.coefficients.values())
    else:
        assert changed(trainer.model, snapshot(AutoModelForCausalLM.from_pretrained(tiny))) != set()
    assert not any(key.startswith("eval_") for line in trainer.state.log_history for key in line)


def test_distributed(tiny: str, tmp_path: Path) -> None:
    """Two processes end where one does, but for rounding, and say what they have exchanged."""
    script = Path(__file__).parent.parent / "examples" / "distributed.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), tiny, str(tmp_path / "two")], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes, ") == 2
    alone = load("examples/distributed.py").main(tiny, str(tmp_path / "one"))
    assert alone.zero_order.ranks.sent == 0
    found = snapshot(AutoModelForCausalLM.from_pretrained(tmp_path / "two"))
    for name, value in snapshot(alone.model).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    assert changed(alone.model, snapshot(AutoModelForCausalLM.from_pretrained(tiny)))
