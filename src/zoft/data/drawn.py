"""Answers drawn from the model, as a batch: what a metric of generated text becomes an objective with a slope by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .collate import IGNORE, place
from .objective import Batch


def drawn(batch: Batch, answers: Tensor, lengths: Sequence[int], shortfalls: Tensor) -> dict[str, Tensor]:
    """The prompts of `batch` [B, T], each followed by its `answers` [N, new], the same number for each.

    Of an answer so many tokens count as `lengths` says, its end included. `shortfalls` [N] is what each falls short of
    the best. As `Collator` has batches whose examples have several sequences: `labels` [N, T + new], the answers'
    tokens; `counts` [B]; and `drawn` float32 [N], the shortfalls, of whose expected value `zoft.data.losses` and
    `zoft.data.slope` then are.
    """
    prompts, new = len(batch["input_ids"]), answers.shape[1]
    samples = len(answers) // prompts
    own = {name: batch[name].repeat_interleave(samples, 0) for name in ("input_ids", "attention_mask")}
    inside = torch.arange(new, device=answers.device) < torch.tensor(lengths, device=answers.device).unsqueeze(1)
    mask = torch.cat((own["attention_mask"], inside.to(own["attention_mask"].dtype)), 1)
    before = torch.full_like(own["input_ids"], IGNORE)
    return {
        "input_ids": torch.cat((own["input_ids"], answers), 1),
        "attention_mask": mask,
        "position_ids": place(mask),
        "labels": torch.cat((before, answers.masked_fill(~inside, IGNORE)), 1),
        "counts": torch.full((prompts,), samples, device=answers.device),
        "drawn": shortfalls.to(answers.device, torch.float32),
        "index": batch["index"],
    }
