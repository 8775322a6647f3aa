"""What the Trainer's own arguments ask for happens with `ZOTrainer` too: nothing of it is zoft's."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.integrations import integration_utils

import zoft
from optim.models import llama, token_batch

from .test_zo_trainer import Arguments, Record, trainer_of


def test_training_stops_early(arguments: Arguments) -> None:
    """With lr 0 the first evaluation is never bettered: it ends after two more."""
    args = arguments(
        max_steps=10, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer = trainer_of(zoft.AGZO(llama(), lr=0.0), args, callbacks=[EarlyStoppingCallback(2)])
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.zero_order is not None and trainer.zero_order.counters.steps == 3


def test_a_plateau_lowers_the_learning_rate(arguments: Arguments) -> None:
    args = arguments(
        max_steps=4, eval_strategy="steps", eval_steps=1, lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5, "threshold": 1e9, "threshold_mode": "abs"},
    )  # fmt: skip
    optimizer = zoft.MeZO(llama(), lr=8e-4)
    trainer_of(optimizer, args).train()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)  # halved at each of three


def test_warmup_and_cosine(arguments: Arguments) -> None:
    record = Record()
    args = arguments(max_steps=6, warmup_steps=2, lr_scheduler_type="cosine", logging_steps=1)
    trainer_of(zoft.AGZO(llama(), lr=4e-3), args, callbacks=[record]).train()
    half = 4e-3 * (1 + 2**-0.5) / 2
    assert record.values("learning_rate") == pytest.approx([0, 2e-3, 4e-3, half, 2e-3, 4e-3 - half])


@pytest.mark.parametrize("method", [zoft.AGZO, zoft.ZOAct])
def test_a_writer_of_reports_gets_the_log(method: Any, arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``report_to``: transformers' TensorBoard callback, with a writer that only remembers."""
    scalars: dict[str, list[tuple[int, float]]] = {}

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None: ...
        def add_text(self, *_: Any) -> None: ...
        def add_hparams(self, *_: Any, **__: Any) -> None: ...
        def flush(self) -> None: ...
        def close(self) -> None: ...

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.setdefault(name, []).append((step, value))

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    optimizer = method(llama(), lr=1e-3)
    args = arguments(max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=2, report_to="tensorboard")
    trainer_of(optimizer, args).train()
    assert [step for step, _ in scalars["train/loss"]] == [1, 2]
    assert scalars["train/projected_grad"][-1] == (2, optimizer.projected_gradients[-1])
    assert scalars["train/zero"] == scalars["train/skipped"] == [(1, 0), (2, 0)]
    assert [step for step, _ in scalars["eval/loss"]] == [2]


@pytest.mark.parametrize("method", [zoft.AGZO, zoft.ZOAct])
def test_push_to_hub(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Arguments) -> None:
    """At each save and at the end; what lies on the hub afterwards is the model, or its adapter, as trained."""
    pushed: list[dict[str, bytes]] = []

    def upload(self: HfApi, *, repo_id: str, folder_path: str, ignore_patterns: Any = None, **_: Any) -> Any:
        assert repo_id == "me/mine"
        pushed.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})
        return SimpleNamespace(is_done=lambda: True, result=lambda: None, done=lambda: True)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    args = arguments(max_steps=2, save_steps=1, push_to_hub=True, hub_model_id="me/mine", hub_strategy="every_save")
    trainer = trainer_of(method(llama(), lr=1e-2), args)
    trainer.train()
    trainer.push_to_hub()
    assert len(pushed) >= 3
    folder = tmp_path / "hub"
    folder.mkdir()
    for name, content in pushed[-1].items():
        (folder / name).write_bytes(content)
    batch = token_batch()
    loaded = type(trainer.model).from_pretrained(folder) if method is zoft.AGZO else llama()
    if method is zoft.ZOAct:
        assert "model.safetensors" not in pushed[-1]
        assert json.loads(pushed[-1]["adapter_config.json"])["peft_type"] == "LORA"
        loaded = PeftModel.from_pretrained(loaded, folder)
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(loaded.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(llama()(**batch).logits, expected, atol=1e-4)


def test_the_objective_may_be_any_function_of_the_outputs(arguments: Arguments) -> None:
    """Here the share of tokens after which the likeliest is another than number 7, which has no slope."""

    def other(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
        return (outputs.logits.argmax(-1) != 7)[labels >= 0].float().mean()

    model, batch = llama(), token_batch(16)

    def share() -> float:
        with torch.no_grad():
            return float(other(model(**batch), batch["labels"]))

    optimizer = zoft.AGZO(model, lr=0.05, eps=0.3, probes=4, leave_one_out=True, shape="rank")
    before = share()
    args: TrainingArguments = arguments(max_steps=30, per_device_train_batch_size=16, lr_scheduler_type="constant")
    trainer_of(optimizer, args, compute_loss_func=other).train()
    assert share() < before - 0.3
