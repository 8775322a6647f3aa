"""Evaluating long prompts with several candidates each: every prompt is read once."""

from typing import Any

import torch
from torch import Tensor

from .collate import IGNORE
from .objective import Batch, examples, read_logits


def read_candidates(model: Any, batch: Batch) -> tuple[Tensor, Batch]:
    """The logits and the batch that `losses` and `choose` take, of a batch that they would take as it is.

    Where an example is several sequences of one prompt, and to read it once halves the tokens or better, the prompts
    run by themselves, and then their candidates on what the model keeps of them (its key-value cache). A model that
    keeps nothing to select from, or an adapter's virtual tokens too, reads every sequence whole.
    """
    of = examples(batch)
    if of is None:
        return read_logits(model, batch), batch
    answers = (batch["labels"] != IGNORE).sum(1)
    tokens, width, prompts = batch["input_ids"].shape[1], int(answers.max()), batch["attention_mask"].sum(1) - answers
    first = (of.diff(prepend=of.new_tensor([-1])) != 0).nonzero().squeeze(1)
    longest = int(prompts.max())
    if 2 * (len(first) * longest + len(of) * width) > of.numel() * tokens:
        return read_logits(model, batch), batch

    prompt = _window(batch, tokens - answers - longest, longest, first)  # ends where the answer begins
    found = model(**prompt, use_cache=True, logits_to_keep=1)
    cache: Any = getattr(found, "past_key_values", None)
    if not hasattr(cache, "batch_select_indices") or cache.get_seq_length() != longest:
        return read_logits(model, batch), batch
    cache.batch_select_indices(of)
    answer = _window(batch, tokens - answers, width, torch.arange(len(of), device=of.device))
    labels = answer["input_ids"].masked_fill(answer["attention_mask"] == 0, IGNORE)
    answer["attention_mask"] = torch.cat((prompt["attention_mask"][of], answer["attention_mask"]), 1)
    rest = model(**answer, past_key_values=cache, use_cache=True).logits
    return torch.cat((found.logits[of], rest), 1), {**batch, "labels": labels}


def _window(batch: Batch, start: Tensor, width: int, rows: Tensor) -> dict[str, Tensor]:
    """The inputs of `rows` in `width` places from `start` [N] on, masked where a sequence has no token."""
    place = start[rows].unsqueeze(1) + torch.arange(width, device=rows.device)
    inside = (place >= 0) & (place < batch["input_ids"].shape[1])
    place = place.clamp(0, batch["input_ids"].shape[1] - 1)
    names = ("input_ids", "attention_mask", "position_ids")
    window = {name: batch[name][rows].gather(1, place) for name in names}
    return window | {"attention_mask": window["attention_mask"] * inside}
