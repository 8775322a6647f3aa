"""An accelerate loop with gradient accumulation: accelerate launch examples/accelerate_loop.py [MODEL]"""

import sys

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoft

TEXTS = ["The sky is blue.", "Grass is green.", "Snow is white.", "Coal is black."] * 4


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", accumulate: int = 2) -> list[float]:
    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def collate(texts: list[str]) -> dict:
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    loader = accelerator.prepare(DataLoader(TEXTS, batch_size=2, shuffle=True, collate_fn=collate))
    optimizer = zoft.ZOAct(model.to(accelerator.device), lr=1e-3)
    losses = []
    for number, batch in enumerate(loader, start=1):
        losses.append(float(optimizer.estimate(lambda batch=batch: model(**batch).loss)))
        if number % accumulate == 0:
            optimizer.step()  # along the mean of the estimates so far
    accelerator.print(f"{optimizer.counters}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
