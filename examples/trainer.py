"""transformers' Trainer with the guided method, then a PEFT adapter: python examples/trainer.py [MODEL [FOLDER]]"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

import zoft

TEXTS = ["The sky is blue.", "Grass is green.", "Snow is white.", "Coal is black."] * 4


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", folder: str = "runs/trainer") -> zoft.ZOTrainer:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = zoft.ZOTrainer(
        model,
        TrainingArguments(folder, max_steps=20, per_device_train_batch_size=4, logging_steps=5, report_to=[]),
        train_dataset=Dataset.from_list([tokenizer(text) for text in TEXTS]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        optimizers=(zoft.Guided(model, lr=1e-3), None),
    )
    trainer.train()
    trainer.save_model()  # loads with peft.PeftModel.from_pretrained(model, folder)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
