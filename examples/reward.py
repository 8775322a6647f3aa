"""A reward of generated text, in a plain loop: python examples/reward.py [MODEL]"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoft

PROMPTS = ["Tell me a story.", "What colour is the sky?", "Name three animals.", "Who are you?"]


def vowels(completions: list[str], **_: object) -> list[float]:
    """The signature of TRL's reward functions."""
    return [sum(text.count(vowel) for vowel in "aeiou") / (1 + len(text)) for text in completions]


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", steps: int = 20) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)

    def closure() -> torch.Tensor:
        """Minus the mean reward of what the model, as it is perturbed now, generates."""
        tokens = model.generate(**batch, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return -torch.tensor(vowels(prompts=PROMPTS, completions=texts)).mean()

    optimizer = zoft.AGZO(model, lr=3e-3, eps=3e-2, probes=8, leave_one_out=True, shape="rank")
    rewards = [-float(optimizer.step(closure)) for _ in range(steps)]
    print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f} with {optimizer.counters.forwards} generations")
    return rewards


if __name__ == "__main__":
    main(*sys.argv[1:])
