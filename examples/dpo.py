"""TRL's DPOTrainer with ZO-Act: python examples/dpo.py [MODEL [FOLDER]]"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

import zoft


class ZODPOTrainer(DPOTrainer, zoft.ZOTrainer):
    pass


ROWS = [{"prompt": "What colour is the sky?", "chosen": " Blue.", "rejected": " I would rather not say."}]


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", folder: str = "runs/dpo") -> ZODPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(name)
    trainer = ZODPOTrainer(
        model,
        args=DPOConfig(folder, max_steps=20, per_device_train_batch_size=4, logging_steps=5, report_to=[], bf16=False),
        train_dataset=Dataset.from_list(ROWS * 16),
        optimizers=(zoft.ZOAct(model, lr=1e-3), None),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
