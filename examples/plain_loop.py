"""A plain PyTorch loop: python examples/plain_loop.py [MODEL]"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import zoft

TEXTS = ["The sky is blue.", "Grass is green.", "Snow is white.", "Coal is black."]


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", steps: int = 20) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    optimizer = zoft.AGZO(model, lr=1e-4)
    losses = []
    for _ in range(steps):
        loss = optimizer.step(lambda: model(**batch).loss)  # two forwards, no backward
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} with {optimizer.counters.forwards} forwards")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
