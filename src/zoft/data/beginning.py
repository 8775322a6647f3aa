"""Evaluating prompts that begin alike (the same shots, the same instruction): the beginning is read once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .collate import IGNORE
from .objective import Batch


class Begun(NamedTuple):
    """A batch whose sequences begin with the same `length` tokens, which a model has read.

    `cache` is what the model keeps of them, for each sequence. `inputs` are the sequences [N, T] with these tokens
    first, then the padding, then what is each sequence's own.
    """

    length: int
    inputs: dict[str, Tensor]
    cache: Any

    def logits(self, model: Any, keep: int) -> Tensor:
        """Those of the last `keep` positions [N, keep, V], by one forward over the rest."""
        own = {name: self.inputs[name][:, self.length :] for name in ("input_ids", "position_ids")}
        mask = self.inputs["attention_mask"]
        return model(**own, attention_mask=mask, past_key_values=self.cache, use_cache=True, logits_to_keep=keep).logits


def begin(model: Any, batch: Batch) -> Begun | None:
    """The beginning that the sequences of `batch` share, read by `model`.

    None if that does not halve the tokens to read, or the model does not keep the keys and values of just these: a
    window or a state keeps less, an adapter of virtual tokens more.
    """
    count, tokens = batch["input_ids"].shape
    length = shared_length(batch)
    if 2 * (length + count * (tokens - length)) > count * tokens:
        return None
    shared = _starting(batch, length)[:1]
    places = torch.arange(length, device=shared.device).unsqueeze(0)
    alone = {"input_ids": shared, "attention_mask": torch.ones_like(shared), "position_ids": places}
    cache: Any = getattr(model(**alone, use_cache=True, logits_to_keep=1), "past_key_values", None)
    if not all(_attends(layer) for layer in getattr(cache, "layers", [None])) or cache.get_seq_length() != length:
        return None
    cache.batch_select_indices(shared.new_zeros(count))
    own = {name: batch[name][:, length:] for name in alone}
    own["attention_mask"] = own["attention_mask"] * (own["position_ids"] >= length)  # not beginnings of shorter ones
    inputs = {name: torch.cat((alone[name].expand(count, -1), own[name]), 1) for name in alone}
    return Begun(length, inputs, cache)


def _attends(layer: Any) -> bool:
    """Whether padding may lie in the midst of what this part of a cache keeps: not in a state, nor in a window."""
    return hasattr(layer, "keys") and not getattr(layer, "is_sliding", False)


def shared_length(batch: Batch) -> int:
    """How many tokens all sequences begin with; one of each prompt, which predicts what follows, is left out."""
    lengths = batch["attention_mask"].sum(1)
    answers = (batch["labels"] != IGNORE).sum(1) if "labels" in batch else 0
    starts = _starting(batch, max(0, int((lengths - answers).min()) - 1))
    return int((starts == starts[0]).all(0).cumprod(0).sum())


def _starting(batch: Batch, width: int) -> Tensor:
    """The first `width` tokens of each sequence [N, width], none of which is shorter."""
    tokens = batch["input_ids"]
    first = tokens.shape[1] - batch["attention_mask"].sum(1, keepdim=True)
    return tokens.gather(1, first + torch.arange(width, device=tokens.device))
