"""A model that stays on disk, larger than memory if need be: python examples/offload.py [MODEL [FOLDER]]"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import zoft
from zoft.train.adapter import save_adapter

TEXTS = ["The sky is blue.", "Grass is green.", "Snow is white.", "Coal is black."]
STEPS = 20


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", folder: str = "runs/offload") -> list[float]:
    where = {"": "disk"}  # beside an accelerator "auto", which fills it and memory first
    model = AutoModelForCausalLM.from_pretrained(name, device_map=where, offload_folder=f"{folder}/weights").eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    optimizer = zoft.ZOAct(model, probe_batching=True)  # the step's points share a forward: one load of the weights
    losses = []
    for _ in range(STEPS):
        loss = optimizer.step(lambda: zoft.cross_entropy(model(**batch).logits, labels))
        losses.append(float(loss))
    save_adapter(optimizer, Path(folder) / "adapter")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, the weights loaded {STEPS} times")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
