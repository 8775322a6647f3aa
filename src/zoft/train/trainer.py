"""`ZOTrainer`: transformers' Trainer, stepping with a zeroth-order optimizer instead of backpropagation."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from zoft.optim import ZeroOrder
from zoft.optim.landscape import Closure
from zoft.train.adapter import save_adapter
from zoft.train.heads import load_heads, save_heads

OPTIMIZER_STATE = "optimizer.pt"  # transformers' file name in a checkpoint
ADAPTED = "_hf_peft_config_loaded"  # transformers' mark of a model that an adapter has been added to


class ZOTrainer(Trainer):
    """A `transformers.Trainer` that trains with forward passes only.

    Pass a zoft optimizer as ``optimizers=(zoft.AGZO(model, lr=1e-4), None)``; everything else is the Trainer's own:
    logging, evaluation, checkpoints, resuming, schedulers, callbacks, gradient accumulation. With a first-order
    optimizer (or none) it is the Trainer unchanged. Subclasses of Trainer, such as TRL's, take it as a further base:
    ``class ZOSFTTrainer(SFTTrainer, ZOTrainer)``.

    All modules but the model itself are in eval mode while it is probed (dropout would only add noise to the loss
    differences). Methods
    that train coefficients beside frozen weights save a PEFT adapter instead of the weights. Under gradient
    accumulation the estimates of a step's batches are averaged, each from the mean loss of its own batch.
    `batch_loss` is the mean loss of the latest batch. Under torchrun every process has a part of each batch, and they
    take one step (`zoft.optim.ranks`).
    """

    batch_loss: Tensor = torch.tensor(math.nan)

    def __init__(self, model: Any = None, *args: Any, **options: Any) -> None:
        optimizer = next(iter(options.get("optimizers", ())), None)
        marked = getattr(model, ADAPTED, False)
        if isinstance(optimizer, ZeroOrder) and optimizer.keeps_coefficients:
            setattr(model, ADAPTED, True)  # else a quantized model is refused: its coefficients are an adapter, though
        try:
            super().__init__(model, *args, **options)
        finally:
            setattr(model, ADAPTED, marked)
        if isinstance(optimizer, ZeroOrder):
            if optimizer.ranks.count > self.args.world_size:
                raise ValueError("every process would take the whole batch: set use_cpu=True in the TrainingArguments")
            if self.args.fsdp:
                raise ValueError(
                    "fsdp=True would leave the model whole in every process: shard it before making the optimizer, by "
                    "from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N))"
                )
            # No gradient is ever reduced: DistributedDataParallel would only take memory for it.
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches; dealt out to the processes that share the data, the same for those that share probes.

        Raises:
            ValueError: probes are to be shared, and the data cannot be dealt out so, since they have no length.
        """
        loader, optimizer = super().get_train_dataloader(), self.zero_order
        if optimizer is not None and optimizer.ranks.groups > 1:
            shard = loader.batch_sampler
            if not isinstance(shard, BatchSamplerShard):
                raise ValueError("processes that share probes need training data with a length")
            shard.num_processes, shard.process_index = optimizer.ranks.parts, optimizer.ranks.part
        return loader

    @property
    def zero_order(self) -> ZeroOrder | None:
        """The zeroth-order optimizer, if that is what trains."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return optimizer if isinstance(optimizer, ZeroOrder) else None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        optimizer = self.zero_order
        if optimizer is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.batch_loss = loss * self.current_gradient_accumulation_steps
            return loss
        model.eval()  # layers with kernels for inference alone have no other mode
        model.training = True  # of the root alone: trainers ask it whether this is training
        self.batch_loss = optimizer.estimate(self.closure(model, self._prepare_inputs(inputs)))
        return self.batch_loss.to(self.args.device) / self.current_gradient_accumulation_steps

    def closure(self, model: nn.Module, inputs: dict[str, Any]) -> Closure:
        """What gives the loss of this batch, as often as an estimate asks for it."""
        return partial(self._loss, model, inputs)

    def _loss(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        with self.compute_loss_context_manager():
            return self.compute_loss(model, dict(inputs))  # which may take labels out

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **options: Any) -> None:
        logs = self.control.should_log
        super()._maybe_log_save_evaluate(tr_loss, *args, **options)
        if logs:  # transformers takes the sum of losses from itself, and one that is not finite would stay for good
            tr_loss.zero_()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        optimizer = self.zero_order
        if optimizer is not None and "loss" in logs:
            logs |= {"projected_grad": optimizer.projected_gradients[-1]} if optimizer.projected_gradients else {}
            logs |= {"skipped": optimizer.counters.skipped, "zero": optimizer.counters.zero}
        super().log(logs, start_time)

    # Coefficients live beside the model: they are saved as an adapter, and loaded with the optimizer's state.

    @property
    def _saves_adapter(self) -> bool:
        return self.zero_order is not None and self.zero_order.keeps_coefficients

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self._saves_adapter:
            return super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        assert self.zero_order is not None
        folder = Path(str(output_dir or self.args.output_dir))
        save_adapter(self.zero_order, folder)
        save_heads(self.zero_order.model, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._saves_adapter:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        assert self.zero_order is not None
        load_heads(self.zero_order.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if not self._saves_adapter:
            return super()._load_best_model()
        assert self.zero_order is not None
        state = Path(str(self.state.best_model_checkpoint)) / OPTIMIZER_STATE
        self.zero_order.load_state_dict(torch.load(state, map_location="cpu", weights_only=True))
