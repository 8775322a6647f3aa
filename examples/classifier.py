"""An encoder with a new head, by the Trainer and the guided method: python examples/classifier.py [MODEL [FOLDER]]"""

import sys

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

import zoft

ROWS = [("What a lovely day", 1), ("A joy to watch", 1), ("I hated it", 0), ("Dull and far too long", 0)] * 4


def main(name: str = "FacebookAI/roberta-base", folder: str = "runs/classifier") -> zoft.ZOTrainer:
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)  # its head is new
    tokenizer = AutoTokenizer.from_pretrained(name)
    trainer = zoft.ZOTrainer(
        model,
        TrainingArguments(folder, max_steps=20, per_device_train_batch_size=8, logging_steps=5, report_to=[]),
        train_dataset=Dataset.from_list([{**tokenizer(text), "labels": label} for text, label in ROWS]),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        # The loss reads one token: attention carries its error to the others. A new head takes many directions.
        optimizers=(zoft.Guided(model, lr=1e-3, rank=64, attention=True), None),
    )
    trainer.train()
    trainer.save_model()  # the head with it; loads with peft.PeftModel.from_pretrained(model, folder)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
