"""`ZOTrainer` in processes that share a step's probes, and so must have the same batches."""

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from forks import spawn
from zoft import LOZO, ZOTrainer

from .tiny import make_model

ROWS = [{"input_ids": torch.arange(3, 9) + i, "labels": torch.arange(3, 9) + i} for i in range(8)]


def process(rank: int, port: int, folder: str) -> None:
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in shared.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    args = TrainingArguments(folder, max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[])
    model, seen = make_model(), []
    optimizer = LOZO(model, lr=1e-3, probes=2, parallel="probes")
    trainer = ZOTrainer(model, args, train_dataset=ROWS, optimizers=(optimizer, None))
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    trainer.train()
    torch.save((seen, model.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_they_have_the_same_batches(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(process, (port, str(tmp_path)), nprocs=2)
    (seen, weights), (others_seen, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(seen) == 3 * 2  # two of four points
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen, others_seen, strict=True))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    start = make_model().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in weights.items())
