"""Training and evaluating on a `zoft.data` task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from zoft.data import (
    Collator,
    Task,
    begin,
    choose,
    examples,
    losses,
    positions_to_keep,
    read_candidates,
    read_logits,
    score,
    slope,
)
from zoft.optim import Loss, Probes
from zoft.train.batches import BatchLoss
from zoft.train.checkpoints import remove, seal, whole_folder
from zoft.train.config import LOSS, SAMPLES
from zoft.train.generate import as_texts, generate
from zoft.train.head import find_head
from zoft.train.processes import wait
from zoft.train.shortfall import Shortfall
from zoft.train.trainer import ZOTrainer

LARGE = 1 << 26  # logits of texts that are evaluated together


class EpochSampler(Sampler[int]):
    """Batches of like length, shuffled: little padding.

    The order depends on the seed and the epoch alone, so that a resumed run goes on with the batches it would have
    had.
    """

    def __init__(self, trainer: Trainer, lengths: list[int]) -> None:
        self._trainer, self._lengths = trainer, lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        args = self._trainer.args
        batches = math.ceil(len(self) / args.train_batch_size)
        epoch = self._trainer.state.global_step // math.ceil(batches / args.gradient_accumulation_steps)
        generator = torch.Generator().manual_seed(args.seed + epoch)
        batch = args.train_batch_size * args.gradient_accumulation_steps
        return iter(LengthGroupedSampler(batch, lengths=self._lengths, generator=generator))


class TaskTrainer(ZOTrainer):
    """A `ZOTrainer` whose loss, batches and metrics are a task's.

    It trains for the task's loss, or for another `objective`, one of its metrics: then the loss of an example is one
    minus that metric of what is predicted for it, as in an evaluation. Methods that take the loss's slope, which this
    one does not have, are given its expected value over the answers that the model may give, or over `samples` drawn.

    A checkpoint is written aside and renamed once it is whole, and notes the identity of the `run`; the best one and
    the last are kept.

    After an evaluation, `predictions` holds what was predicted, by row number: a candidate's index, a text, or a loss.
    With ``args.save_strategy="best"``, checkpoints are saved at a new best and, if `save_steps` is given, every so many
    steps (where it is evaluated) and at the end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        args: TrainingArguments,
        run: dict[str, Any] | None = None,
        save_steps: int | None = None,
        objective: str = LOSS,
        samples: int = SAMPLES,
        **rest: Any,
    ) -> None:
        self.task, self.tokenizer, self.save_steps, self.run = task, tokenizer, save_steps, run or {}
        self._place: Path | None = None  # of a checkpoint that is being written
        self.predictions: dict[int, Any] = {}
        pad = tokenizer.pad_token_id
        self._predict = Collator(pad, "generate" if task.kind == "generation" else "eval")
        collate = Collator(pad, "train") if objective == LOSS else self._predict
        super().__init__(model, args, data_collator=collate, processing_class=tokenizer, **rest)
        dataset: Any = self.train_dataset
        self._shortfall: Shortfall | None = None
        if objective != LOSS:
            self._shortfall = Shortfall(dataset.task, objective, dataset.rows, tokenizer, samples)

        self.remove_callback(PrinterCallback)  # it prints on standard output
        self._head = find_head(model) if task.kind in ("generation", "text") else None  # others read few logits
        self.model_accepts_loss_kwargs = False  # the loss below is a batch's mean, whatever a step accumulates

    # --- batches ---------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = train_dataset or self.train_dataset
        return EpochSampler(self, dataset.lengths)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every process draws the same batches, and takes its part of each."""
        optimizer, collate = self.zero_order, self.data_collator
        if optimizer is None:
            return super().get_train_dataloader()
        with self._collating(lambda items: collate(optimizer.ranks.share(items))):
            loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard):  # accelerate's, among several processes
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Longest first: no padding to speak of, and a batch too large for the memory shows at once."""
        return sorted(range(len(eval_dataset)), key=lambda index: -eval_dataset.lengths[index])

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        with self._collating(self._predict):
            return super().get_eval_dataloader(eval_dataset)

    @contextmanager
    def _collating(self, collate: Callable[[list[Any]], dict[str, Tensor]]) -> Iterator[None]:
        """Have loaders that are made meanwhile make their batches so."""
        usual, self.data_collator = self.data_collator, collate
        try:
            yield
        finally:
            self.data_collator = usual

    # --- loss and predictions --------------------------------------------------------------------------------

    def training_step(
        self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self._shortfall is not None and not self._probed:
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                inputs = self._shortfall.expecting(model.eval(), inputs, hash((self.args.seed, self.state.global_step)))
        return super().training_step(model, inputs, num_items_in_batch)

    @property
    def _probed(self) -> bool:
        """Whether probes train, which take an objective as it is; others take the slope of its expected value."""
        return self.zero_order is not None and isinstance(self.zero_order.estimator, Probes)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of each example [B] and its slope for a zeroth-order optimizer, their mean for a first-order one."""
        if self._shortfall is not None and self._probed:
            guesses = self._decode(self._guess(model, inputs, self._shortfall.task)[0].cpu().numpy())
            return self._shortfall.of(guesses, inputs["index"].tolist())
        logits = read_logits(model, inputs, self._head)
        loss: Any = losses(logits, inputs)
        loss = loss.mean() if self.zero_order is None else Loss(loss, partial(slope, logits, inputs), examples(inputs))
        return (loss, logits) if return_outputs else loss

    def closure(self, model: nn.Module, inputs: dict[str, Tensor]) -> BatchLoss:
        return BatchLoss(partial(self._loss, model), inputs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Any, Tensor]:
        """No mean loss (`evaluate` takes that of all examples), what `_guess` finds, and row numbers [B]."""
        inputs = self._prepare_inputs(inputs)
        return None, self._guess(model, inputs, self._evaluated, together=True), inputs["index"]

    def _guess(
        self, model: nn.Module, inputs: dict[str, Tensor], task: Task, together: bool = False
    ) -> tuple[Tensor, ...]:
        """Predicted candidates [B] and the losses [B]; or predicted tokens [B, new]; or, of texts, the losses twice.

        With `together`, what all begin with is read once; not in a step, whose directions may differ by the sequence.
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            if task.kind == "text":
                found = torch.cat([losses(read_logits(model, part, self._head), part) for part in self._parts(inputs)])
                return found, found
            begun = begin(model, inputs) if together else None
            if task.kind == "generation":
                return (generate(model, self.tokenizer, task, inputs, begun),)
            if begun is None:
                logits, batch = read_candidates(model, inputs)
            else:
                logits, batch = begun.logits(model, positions_to_keep(inputs)), inputs
            return choose(logits, batch), losses(logits, batch)

    def _parts(self, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The batch in parts whose logits, at every token of a text, are not too many."""
        model: Any = self.model
        count, tokens = inputs["input_ids"].shape
        together = max(1, LARGE // (tokens * model.config.get_text_config().vocab_size))
        for start in range(0, count, together):
            yield {name: tensor[start : start + together] for name, tensor in inputs.items()}

    # --- metrics ---------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """The task's metrics on a `zoft.data.TaskDataset`, by transformers' evaluation loop."""
        dataset: Any = eval_dataset or self.eval_dataset
        self._evaluated = dataset.task

        def compute_metrics(found: EvalPrediction) -> dict[str, float]:
            guesses, *loss = found.predictions
            predictions, index = self._decode(guesses), np.asarray(found.label_ids).tolist()
            self.predictions = dict(zip(index, predictions, strict=True))
            metrics = score(self.task, predictions, [dataset.rows[i] for i in index])
            return metrics | {"loss": float(loss[0].mean(dtype=np.float64))} if loss else metrics

        self.compute_metrics = compute_metrics
        return super().evaluate(dataset, ignore_keys, metric_key_prefix)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether to save now. Of equal metrics the one with the lower loss is best."""
        metric, loss = metrics[str(self.args.metric_for_best_model)], metrics.get("eval_loss", math.inf)
        kept = (line for line in self.state.log_history if line["step"] == self.state.best_global_step)
        if metric == self.state.best_metric and any(loss < line.get("eval_loss", -math.inf) for line in kept):
            self.state.best_metric = None
        best = super()._determine_best_metric(metrics, trial)
        step = self.state.global_step
        due = self.save_steps is not None and (step % self.save_steps == 0 or step >= self.state.max_steps)
        return best or due or self.control.should_save

    # --- checkpoints -----------------------------------------------------------------------------------------

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """No further step if the checkpoint was the last one: Trainer looks for the end only after a step."""
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **options)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._place is None else str(self._place)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            self._write_checkpoint(model, trial)
        else:
            super()._save_checkpoint(model, trial)  # which waits for the first process, and writes nothing
        wait()

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:  # what is random has a seed: one is enough
            super()._save_rng_state(output_dir)

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        out, state = Path(str(self.args.output_dir)), self.state
        target = out / f"checkpoint-{state.global_step}"
        try:
            with whole_folder(target) as aside:
                self._place = aside.parent
                super()._save_checkpoint(model, trial)
                seal(aside, self.run)
        finally:
            self._place = None
        kept = {target.name, f"checkpoint-{state.best_global_step}"}
        for folder in out.glob("checkpoint-*"):
            if folder.name not in kept:
                remove(folder)

    def _decode(self, predictions: Any) -> list[Any]:
        return as_texts(self.tokenizer, predictions) if self.task.kind == "generation" else predictions.tolist()
