"""Training and evaluating on a `zoft.data` task."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from zoft.data import Collator, Task, choose, losses, read_logits, score
from zoft.train.trainer import ZOTrainer


class TaskTrainer(ZOTrainer):
    """A `ZOTrainer` whose loss, batches and metrics are a task's.

    After an evaluation, `predictions` holds what was predicted, by row number: a candidate's index or a text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        args: TrainingArguments,
        **rest: Any,
    ) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.predictions: dict[int, int | str] = {}
        self._collate = {
            "train": Collator(tokenizer.pad_token_id, "train"),
            "eval": Collator(tokenizer.pad_token_id, "eval"),
            "generate": Collator(tokenizer.pad_token_id, "generate"),
        }
        super().__init__(model, args, data_collator=self._collate["train"], processing_class=tokenizer, **rest)

    # --- batches ---------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        """Batches of like length, shuffled: little padding."""
        dataset: Any = train_dataset or self.train_dataset
        generator = torch.Generator().manual_seed(self.args.seed)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(batch, lengths=dataset.lengths, generator=generator)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Longest first: no padding to speak of, and a batch too large for the memory shows at once."""
        return sorted(range(len(eval_dataset)), key=lambda index: -eval_dataset.lengths[index])

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        training = self.data_collator
        self.data_collator = self._collate["generate" if self.task.kind == "generation" else "eval"]
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    # --- loss and predictions --------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of each example [B] for a zeroth-order optimizer, their mean for a first-order one."""
        logits = read_logits(model, inputs)
        loss = losses(logits, inputs)
        if self.zero_order is None:
            loss = loss.mean()
        return (loss, logits) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Losses [B] (none for generation), predicted candidates [B] or tokens [B, new], and row numbers [B]."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.task.kind == "generation":
                return None, self._generate(inputs), inputs["index"]
            logits = read_logits(model, inputs)
            return losses(logits, inputs), choose(logits, inputs), inputs["index"]

    def _generate(self, inputs: dict[str, Tensor]) -> Tensor:
        model: Any = self.model
        prompt = inputs["input_ids"]
        output = model.generate(
            input_ids=prompt,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.task.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            stop_strings=self.task.stop,
            tokenizer=self.tokenizer,
        )
        return output[:, prompt.shape[1] :]

    # --- metrics ---------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """The task's metrics on a `zoft.data.TaskDataset`, by transformers' evaluation loop."""
        dataset: Any = eval_dataset or self.eval_dataset

        def compute_metrics(found: EvalPrediction) -> dict[str, float]:
            predictions, index = self._decode(found.predictions), np.asarray(found.label_ids).tolist()
            self.predictions = dict(zip(index, predictions, strict=True))
            return score(self.task, predictions, [dataset.rows[i] for i in index])

        self.compute_metrics = compute_metrics
        return super().evaluate(dataset, ignore_keys, metric_key_prefix)

    def _decode(self, predictions: Any) -> list[Any]:
        if self.task.kind != "generation":
            return predictions.tolist()
        tokens = np.where(predictions < 0, self.tokenizer.pad_token_id, predictions)
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))
