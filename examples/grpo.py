"""TRL's GRPOTrainer with the guided method, for a reward of generated text: python examples/grpo.py [MODEL [FOLDER]]"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

import zoft


class ZOGRPOTrainer(GRPOTrainer, zoft.ZOTrainer):
    pass


def vowels(completions: list[str], **_: object) -> list[float]:
    return [sum(text.count(vowel) for vowel in "aeiou") / (1 + len(text)) for text in completions]


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", folder: str = "runs/grpo") -> ZOGRPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(name)
    lengths = {"max_completion_length": 16, "num_generations": 4, "per_device_train_batch_size": 4}
    args = GRPOConfig(folder, **lengths, max_steps=20, logging_steps=5, report_to=[], bf16=False)
    trainer = ZOGRPOTrainer(
        model,
        reward_funcs=vowels,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "Tell me a story."}] * 16),
        optimizers=(zoft.Guided(model, lr=1e-3), None),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
