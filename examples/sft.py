"""TRL's SFTTrainer with AGZO: python examples/sft.py [MODEL [FOLDER]]"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import zoft


class ZOSFTTrainer(SFTTrainer, zoft.ZOTrainer):
    """The other trainers of TRL take zoft in the same way: theirs first, then `zoft.ZOTrainer`."""


ROWS = [{"prompt": "What colour is the sky?", "completion": " Blue."}, {"prompt": "Of grass?", "completion": " Green."}]


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", folder: str = "runs/sft") -> ZOSFTTrainer:
    model = AutoModelForCausalLM.from_pretrained(name)
    trainer = ZOSFTTrainer(
        model,
        SFTConfig(folder, max_steps=20, per_device_train_batch_size=4, logging_steps=5, report_to=[], bf16=False),
        train_dataset=Dataset.from_list(ROWS * 8),
        optimizers=(zoft.AGZO(model, lr=1e-4), None),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
