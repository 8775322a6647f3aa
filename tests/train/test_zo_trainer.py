"""`ZOTrainer` as a drop-in: transformers' arguments, a plain data set of dicts, the default collator."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

import zoft
from optim.models import changed, llama, snapshot, token_batch
from zoft import ZeroOrder, ZOTrainer

Arguments = Callable[..., TrainingArguments]


def examples(count: int = 16) -> list[dict[str, Any]]:
    batch = token_batch(count)
    return [{name: tensor[i] for name, tensor in batch.items()} for i in range(count)]


class Record(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.lines.append(given["logs"])

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if name in line]


def trainer_of(optimizer: Any, args: TrainingArguments, **options: Any) -> ZOTrainer:
    rows = examples()
    return ZOTrainer(
        optimizer.model, args, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, None), **options
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda model: zoft.AGZO(model, lr=1e-2, rank=4),
        lambda model: zoft.ZOAct(model, lr=1e-2, rank=4),
        lambda model: zoft.LOZO(model, lr=3e-3, rank=4),
        lambda model: zoft.MeZO(model, lr=1e-3),
    ],
)
def test_loss_falls(make: Callable[[PreTrainedModel], ZeroOrder], arguments: Arguments) -> None:
    trainer = trainer_of(make(llama()), arguments(max_steps=60, per_device_train_batch_size=16))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.03
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("make", [zoft.AGZO, zoft.ZOAct, zoft.MeZO])
def test_accumulation_averages_estimates(make: Any, arguments: Arguments) -> None:
    """A step over two batches is that of the optimizer's own two estimates, each of its batch's mean loss."""
    model, own = llama(), llama()
    args = arguments(max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=2, logging_steps=1)
    record, seen = Record(), []
    trainer = trainer_of(make(model, lr=1e-3), args, callbacks=[record])
    compute = trainer.compute_loss

    def spy(network: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        if not seen or seen[-1]["input_ids"] is not inputs["input_ids"]:
            seen.append(inputs)
        return compute(network, inputs, *rest, **options)

    trainer.compute_loss = spy  # type: ignore[method-assign]
    trainer.train()

    optimizer = make(own, lr=1e-3)
    first, second = seen
    losses = [optimizer.estimate(lambda batch=batch: own(**batch).loss) for batch in (first, second)]
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, own.get_parameter(name))
    found = trainer.zero_order
    assert found is not None
    for name, factor in optimizer.coefficients.items():
        assert torch.equal(found.coefficients[name], factor)
    assert record.values("loss")[0] == pytest.approx(float(sum(losses)) / 2, rel=1e-4)


def test_scheduler_sets_the_learning_rate(arguments: Arguments) -> None:
    """With a linear schedule over four steps of equal estimates, the moves shrink as 4, 3, 2, 1."""
    model = llama()
    moves, rates = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.before = snapshot(model)
            rates.append(optimizer.param_groups[0]["lr"])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            square = sum(float((t - self.before[n]).square().sum()) for n, t in snapshot(model).items())
            moves.append(square**0.5 / abs(optimizer.projected_gradients[-1]))

    optimizer = zoft.MeZO(model, lr=4e-4)
    trainer_of(optimizer, arguments(max_steps=4, lr_scheduler_type="linear"), callbacks=[Watch()]).train()
    assert rates == pytest.approx([4e-4, 3e-4, 2e-4, 1e-4])
    assert moves == pytest.approx([moves[0] * share for share in (1, 0.75, 0.5, 0.25)], rel=0.05)


@pytest.mark.parametrize("make", [partial(zoft.AGZO, lr=1e-3), lambda model: torch.optim.SGD(model.parameters(), 0.0)])
def test_a_loss_that_is_not_finite_is_logged_once(make: Callable[[PreTrainedModel], Any], arguments: Arguments) -> None:
    """Once all that followed was logged as not finite."""
    record, model = Record(), llama()
    args = arguments(max_steps=4, logging_steps=1, logging_nan_inf_filter=False)
    rows = examples()
    trainer = ZOTrainer(model, args, train_dataset=rows, optimizers=(make(model), None), callbacks=[record])
    compute = trainer.compute_loss

    def breaks(network: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        loss = compute(network, inputs, *rest, **options)
        return loss + math.nan if trainer.state.global_step == 1 else loss

    trainer.compute_loss = breaks  # type: ignore[method-assign]
    trainer.train()
    assert [math.isfinite(loss) for loss in record.values("loss")] == [True, False, True, True]


def test_callbacks_get_the_projected_gradient(arguments: Arguments) -> None:
    record = Record()
    optimizer = zoft.AGZO(llama(), lr=1e-3)
    trainer_of(optimizer, arguments(max_steps=2, logging_steps=1), callbacks=[record]).train()
    found = record.values("projected_grad")
    assert len(found) == 2 and found[-1] == optimizer.projected_gradients[-1] != 0
    assert record.values("skipped") == record.values("zero") == [0, 0]


@pytest.mark.parametrize("method", [zoft.AGZO, zoft.ZOAct])
def test_best_model_is_loaded_at_the_end(method: Any, arguments: Arguments) -> None:
    """Far too large a learning rate: the first evaluation is the best, and what is loaded gives it again."""
    record = Record()
    args = arguments(
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer = trainer_of(method(llama(), lr=5.0, eps=1e-2, seed=1), args, callbacks=[record])
    trainer.train()
    evaluated = record.values("eval_loss")
    assert min(evaluated) < evaluated[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-6)


@pytest.mark.parametrize("method", [zoft.AGZO, zoft.ZOAct, zoft.LOZO, zoft.MeZO])
def test_resume(method: Any, arguments: Arguments, tmp_path: Path) -> None:
    """Six steps at once are three steps, a checkpoint, and three more."""

    def run(folder: str, steps: int, **options: Any) -> ZOTrainer:
        args = arguments(
            output_dir=str(tmp_path / folder), max_steps=6, save_steps=3, lr_scheduler_type="constant", seed=1
        )
        trainer = trainer_of(method(llama(), lr=1e-3), args)
        if steps < 6:
            trainer.add_callback(StopAt(steps))
        trainer.train(**options)
        return trainer

    whole = run("whole", 6)
    run("parts", 3)
    resumed = run("parts", 6, resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert changed(whole.model, snapshot(resumed.model)) == set()
    assert whole.zero_order is not None and resumed.zero_order is not None
    assert whole.zero_order.counters == resumed.zero_order.counters
    for name, factor in whole.zero_order.coefficients.items():
        assert torch.equal(factor, resumed.zero_order.coefficients[name])


class StopAt(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop |= state.global_step == self.step
        return control


def test_first_order_is_the_trainer_unchanged(arguments: Arguments) -> None:
    states = []
    for kind in (Trainer, ZOTrainer):
        model = llama()
        args = arguments(max_steps=3, learning_rate=1e-3, gradient_accumulation_steps=2, logging_steps=1)
        kind(model, args, train_dataset=examples()).train()
        states.append(snapshot(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert changed(llama(), states[0]) != set()


def test_layers_need_no_training_mode(arguments: Arguments) -> None:
    """Some kernels of quantized weights are for inference alone, and refuse it."""

    class Inference(torch.nn.Linear):
        def train(self, mode: bool = True) -> "Inference":
            assert not mode
            return super().train(mode)

    model = llama()
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Inference
    optimizer = zoft.ZOAct(model, lr=1e-3)
    trainer_of(optimizer, arguments(max_steps=2)).train()
    assert optimizer.counters.steps == 2 and optimizer.counters.zero == 0


@pytest.mark.parametrize("method, taken", [(zoft.ZOAct, True), (zoft.AGZO, False)])
def test_a_quantized_model_is_taken_where_coefficients_train(method: Any, taken: bool, arguments: Arguments) -> None:
    """transformers refuses one without an adapter, which is what coefficients become."""
    model = llama()
    model.is_quantized = True
    with nullcontext() if taken else pytest.raises(ValueError, match="purely quantized"):
        trainer_of(method(model, lr=1e-3), arguments(max_steps=2)).train()
    assert not getattr(model, "_hf_peft_config_loaded", False)


def test_an_offloaded_model_is_trained_saved_and_resumed_as_one_in_memory(arguments: Arguments, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    places = {"device_map": {"model": "disk", "lm_head": "disk"}, "offload_folder": tmp_path / "weights"}

    def run(name: str, steps: int, *, offloaded: bool, resume: str | None = None) -> list[Any]:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **(places if offloaded else {}))
        assert any(p.is_meta for p in model.parameters()) == offloaded
        often = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "constant"}
        args = arguments(output_dir=str(tmp_path / name), max_steps=steps, **often)
        trainer = trainer_of(zoft.ZOAct(model, lr=1e-2), args)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(tmp_path / name / "final"))
        adapter = (tmp_path / name / "final" / "adapter_model.safetensors").read_bytes()
        return [adapter, trainer.evaluate()["eval_loss"]]

    run("begun", 2, offloaded=True)
    resumed = run("resumed", 4, offloaded=True, resume=str(tmp_path / "begun" / "checkpoint-2"))
    assert resumed == run("plain", 4, offloaded=False)


def test_sharding_by_the_trainer_is_refused(arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(ValueError, match=r"DistributedConfig\(fsdp_size=N\)"):
        trainer_of(zoft.ZOAct(llama()), arguments(fsdp=True))
