"""Model families through `TaskTrainer`: a step, an evaluation, and batches that do not change what comes out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import zoft
from optim.models import changed, snapshot
from zoft.data import Encoder, Task, TaskDataset, load_task
from zoft.train import TaskTrainer

from .tiny import FAMILIES, TOKENIZER, make_model, questions, reviews

TASKS = {"sst2": reviews, "squad": questions}
COPA = {
    "premise": "the cat drinks",
    "question": "effect",
    "choice1": "it is fine",
    "choice2": "a dull film",
    "label": 0,
}


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    if name == "copa":
        return [COPA | {"premise": "the cat drinks" + " tea" * i, "label": i % 2} for i in range(count)]
    return TASKS[name](count)


def dataset_of(name: str, count: int = 7) -> tuple[Task, TaskDataset]:
    task = load_task(name)
    rows = [task.read(row) for row in rows_of(name, count)]
    return task, TaskDataset(rows, Encoder(TOKENIZER, task, 200))


def trainer_of(family: str, name: str, args: TrainingArguments, **options: Any) -> TaskTrainer:
    task, dataset = dataset_of(name)
    model = make_model(family)
    return TaskTrainer(model, TOKENIZER, task, args, train_dataset=dataset, eval_dataset=dataset, **options)


@pytest.mark.parametrize("name", ["sst2", "squad"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_and_an_evaluation(family: str, name: str, arguments: Callable[..., TrainingArguments]) -> None:
    task, dataset = dataset_of(name)
    model = make_model(family)
    optimizer = zoft.AGZO(model, lr=1e-2)
    args = arguments(max_steps=1, per_device_train_batch_size=4, remove_unused_columns=False)
    trainer = TaskTrainer(
        model, TOKENIZER, task, args, train_dataset=dataset, eval_dataset=dataset, optimizers=(optimizer, None)
    )
    before = snapshot(model)
    trainer.train()
    assert changed(model, before) == {f"{m.name}.weight" for m in optimizer.maps}
    assert optimizer.counters.skipped == optimizer.counters.zero == 0
    found = trainer.evaluate()
    assert 0 <= found[f"eval_{task.metric}"] <= 1
    assert sorted(trainer.predictions) == list(range(len(dataset)))


@pytest.mark.parametrize("name", ["sst2", "copa", "squad"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_one_by_one(family: str, name: str, arguments: Callable[..., TrainingArguments]) -> None:
    """Padding changes neither losses nor choices nor generated text."""
    found = []
    for size in (1, 7):
        args = arguments(per_device_eval_batch_size=size, remove_unused_columns=False)
        trainer = trainer_of(family, name, args)
        found.append((trainer.evaluate(), trainer.predictions))
    (single, one_by_one), (batched, together) = found
    assert one_by_one == together
    if name != "squad":
        assert batched["eval_loss"] == pytest.approx(single["eval_loss"], rel=1e-5)
    if name == "squad":
        assert any(len(str(text)) > 0 for text in together.values())


def test_loss_is_the_mean_over_examples(arguments: Callable[..., TrainingArguments]) -> None:
    """Also where the last batch is smaller than the others."""
    losses = [
        trainer_of("llama", "sst2", arguments(per_device_eval_batch_size=size)).evaluate()["eval_loss"]
        for size in (1, 4)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("name", ["sst2", "copa"])
def test_first_order_accumulates_means(name: str, arguments: Callable[..., TrainingArguments]) -> None:
    """Two batches of four in a step move the weights as the mean of their gradients does."""
    moved = []
    for size, accumulate in ((8, 1), (4, 2)):
        task, dataset = dataset_of(name, 8)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        args = arguments(
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
        )
        TaskTrainer(model, TOKENIZER, task, args, train_dataset=dataset, optimizers=(optimizer, None)).train()
        moved.append(snapshot(model))
    for name_, tensor in moved[0].items():
        torch.testing.assert_close(moved[1][name_], tensor, rtol=1e-4, atol=1e-6)


def test_generation_ends_where_answers_do(
    arguments: Callable[..., TrainingArguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the tokenizer's end-of-sequence token, which training teaches, and at those that the model declares."""
    trainer = trainer_of("llama", "squad", arguments())
    model: Any = trainer.model
    model.generation_config.eos_token_id = [1, 5]
    generate, ends = model.generate, []

    def record(**options: Any) -> Any:
        ends.append(options["eos_token_id"])
        return generate(**options)

    monkeypatch.setattr(model, "generate", record)
    trainer.evaluate()
    assert ends == [[1, TOKENIZER.eos_token_id, 5]]
