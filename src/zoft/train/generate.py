"""Answers that a model generates: the likeliest, or drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoft.data import UNKNOWN, Begun, Task, reply_end
from zoft.optim.landscape import Randomness
from zoft.train.models import longest

# What a model's own settings for generating would change.
PLAIN: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
PLAIN |= {"cache_implementation": None}
GREEDY = PLAIN | {"do_sample": False}
ANY = PLAIN | {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}


def generate(
    model: Any, tokenizer: Any, task: Task, inputs: dict[str, Tensor], begun: Begun | None = None, samples: int = 0
) -> Tensor:
    """New tokens after the prompts of `inputs` [N, T]: of the likeliest answers [N, new], by single tokens.

    Or, with `samples`, of so many answers to each drawn as the model gives them [N * samples, new]. `begun` is what the
    model has read already. Fewer tokens than the task allows are generated where the model takes no more.
    """
    length, new = inputs["input_ids"].shape[1], task.max_new_tokens or UNKNOWN
    if (positions := longest(model)) is not None:
        new = min(new, positions - length)
    prompt, read = (inputs, None) if begun is None else (begun.inputs, begun.cache)
    output = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        past_key_values=read,
        max_new_tokens=new,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer),
        stop_strings=task.stop,
        tokenizer=tokenizer,
        **(ANY | {"num_return_sequences": samples} if samples else GREEDY),
    )
    return output[:, length:]


def end_tokens(model: Any, tokenizer: Any) -> list[int] | None:
    """Tokens that end a text: those that the model declares, and those that answers and replies learn to end in."""
    declared = model.generation_config.eos_token_id
    ends = {*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id, reply_end(tokenizer)}
    return sorted(ends - {None}) or None


def lengths(model: Any, tokenizer: Any, task: Task, answers: Tensor) -> list[int]:
    """How many of the tokens of each of the `answers` [N, new] were generated, the end included; the rest is filled."""
    ends, stop = set(end_tokens(model, tokenizer) or ()), task.stop

    def length(tokens: Sequence[int]) -> int:
        stops = stop is not None and stop in tokenizer.decode(tokens)
        for count, token in enumerate(tokens, 1):
            if token in ends or (stops and stop in tokenizer.decode(tokens[:count])):
                return count
        return len(tokens)

    return [length(tokens) for tokens in answers.tolist()]


def as_texts(tokenizer: Any, tokens: Any) -> list[str]:
    """What the rows of `tokens` say; negative numbers fill them."""
    found = np.asarray(tokens.cpu() if isinstance(tokens, Tensor) else tokens)
    return list(tokenizer.batch_decode(np.where(found < 0, tokenizer.pad_token_id, found), skip_special_tokens=True))


@contextmanager
def random_as(seed: int, device: torch.device) -> Iterator[None]:
    """While open, torch draws as `seed` says, on the CPU and on `device`; then on as if nothing had been drawn."""
    randomness = Randomness({device})
    randomness.rewind()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        randomness.rewind()
