"""Trainer in several processes: torchrun --standalone --nproc-per-node 2 examples/distributed.py [MODEL [FOLDER]]

Each has a part of every batch. They exchange losses and the small products that AGZO's bases are made of.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

import zoft

TEXTS = ["The sky is blue.", "The fox is bold.", "The bus is slow.", "The ice is cold."] * 4


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", folder: str = "runs/distributed") -> zoft.ZOTrainer:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    optimizer = zoft.AGZO(model, lr=1e-4)
    cpu = not torch.accelerator.is_available()  # else processes on CPUs do not know of one another
    whole = {"split_batches": True}  # a batch is 4 in all, not 4 each
    args = TrainingArguments(
        folder, max_steps=10, per_device_train_batch_size=4, accelerator_config=whole, use_cpu=cpu, report_to=[]
    )
    rows = Dataset.from_list([tokenizer(text) for text in TEXTS])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = zoft.ZOTrainer(model, args, train_dataset=rows, data_collator=collator, optimizers=(optimizer, None))
    trainer.train()
    trainer.save_model()
    print(f"{optimizer.ranks.count} processes, {optimizer.ranks.sent / 10:.0f} bytes a step from each")
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
