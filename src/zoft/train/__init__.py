"""Training and evaluation on transformers' Trainer."""

from zoft.train.batches import random_batch, task_batches, task_closures
from zoft.train.config import TrainConfig
from zoft.train.models import load_model
from zoft.train.run import train
from zoft.train.task_trainer import TaskTrainer
from zoft.train.trainer import ZOTrainer

__all__ = [
    "TaskTrainer",
    "TrainConfig",
    "ZOTrainer",
    "load_model",
    "random_batch",
    "task_batches",
    "task_closures",
    "train",
]
