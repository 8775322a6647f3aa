"""transformers' training arguments for a run."""

from __future__ import annotations

from transformers import TrainingArguments

from zoft.data import Task
from zoft.errors import UserError
from zoft.train.config import TrainConfig
from zoft.train.models import find_device


def training_arguments(config: TrainConfig, task: Task, folder: str) -> TrainingArguments:
    """The arguments that `config` amounts to; checkpoints go to `folder`.

    Raises:
        UserError: this machine cannot do what they ask for.
    """
    schedule = config.schedule or "constant"
    if schedule == "constant" and config.warmup_steps:
        schedule = "constant_with_warmup"
    try:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.eval_batch_size,
            gradient_accumulation_steps=config.accumulate,
            lr_scheduler_type=schedule,
            lr_scheduler_kwargs={"lr_end": 0.0} if schedule == "polynomial" else None,  # not 1e-7, which a rate may be
            warmup_steps=config.warmup_steps,
            max_grad_norm=0.0,  # gradients are neither computed nor, for the references, clipped
            eval_strategy="steps",
            eval_steps=config.eval_steps,
            save_strategy="best",
            metric_for_best_model=f"eval_{task.metric}",
            greater_is_better=True,
            logging_steps=min(config.log_steps, config.steps),
            logging_nan_inf_filter=False,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            seed=config.seed,
            bf16=config.autocast,
            use_cpu=find_device(config.device).type == "cpu",
        )
        if args.n_gpu > 1:
            args._n_gpu = 1  # no DataParallel: it would copy the model in every forward pass
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{reason} Try --dtype float32, or --device cpu") from error
    return args
