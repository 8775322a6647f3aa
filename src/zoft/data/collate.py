"""From examples to a batch of tensors."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .encode import Item

IGNORE = -100
"""Label of a position without a target, as transformers has it."""

COMMON = {"label_words"}  # of all examples of a batch
SEQUENCES = {"input_ids", "attention_mask", "position_ids", "labels", "norms", "drawn"}  # the rest is of examples


class Collator:
    """Makes a batch of B examples: N sequences, padded on the left to T tokens.

    Always: `input_ids`, `attention_mask`, `position_ids` [N, T] int64; `index` [B] int64, the row numbers.

    - Classification by label words of one token each ("train" and "eval"): a sequence is a prompt, N = B.
      `label_words` [W] int64; `targets` [B] int64, the index of the right word.
    - "train" for choice, generation and text, and "eval" for the latter two: a sequence is a prompt with its right
      candidate, N = B. `labels` [N, T] int64, the candidate's tokens and those of earlier replies in the prompt, at
      their own positions, -100 elsewhere.
    - "eval" for choice, and classification by longer label words: one sequence for each candidate, those of an
      example next to one another. `labels` as above; `counts` [B] int64, the candidates of each example, N = their
      sum; `targets` [B]; `norms` [N] float32, what a sequence's log-probability is divided by before candidates
      are compared: the number of the candidate's tokens for choice (as in MeZO), 1 for classification.
    - "generate": a sequence is a prompt, N = B, and there is no target.

    All items of a batch are of one task.
    """

    def __init__(self, pad_token_id: int, mode: Literal["train", "eval", "generate"]) -> None:
        self.pad_token_id = pad_token_id
        self.mode = mode

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        index = {"index": torch.tensor([item.index for item in items])}
        kind = items[0].kind
        if self.mode == "generate":
            return self._prompts(items) | index
        if kind == "classification" and all(len(word) == 1 for word in items[0].candidates):
            words = {"label_words": torch.tensor([word for [word] in items[0].candidates])}
            return self._prompts(items) | words | _targets(items) | index
        if kind in ("generation", "text") or (kind == "choice" and self.mode == "train"):
            return self._answered([(item, item.candidates[item.gold]) for item in items]) | index
        pairs = [(item, candidate) for item in items for candidate in item.candidates]
        counts = {
            "counts": torch.tensor([len(item.candidates) for item in items]),
            "norms": torch.tensor([float(len(answer)) if kind == "choice" else 1.0 for _, answer in pairs]),
        }
        return self._answered(pairs) | counts | _targets(items) | index

    def _prompts(self, items: Sequence[Item]) -> dict[str, Tensor]:
        return self._inputs([item.prompt for item in items])

    def _answered(self, pairs: Sequence[tuple[Item, list[int]]]) -> dict[str, Tensor]:
        labels = [_labels(item, answer) for item, answer in pairs]
        return self._inputs([item.prompt + answer for item, answer in pairs]) | {"labels": _pad(labels, IGNORE)}

    def _inputs(self, sequences: Sequence[list[int]]) -> dict[str, Tensor]:
        mask = _pad([[1] * len(sequence) for sequence in sequences], 0)
        return {
            "input_ids": _pad(sequences, self.pad_token_id),
            "attention_mask": mask,
            "position_ids": place(mask),
        }


def place(mask: Tensor) -> Tensor:
    """The position of each token [N, T] among those of its sequence that `mask` says are there; 0 before the first."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def divide(batch: dict[str, Tensor], number: int) -> list[dict[str, Tensor]]:
    """At least `number` parts of `batch`, and no more than it takes, with as many examples each; or each example."""
    sequences, counts = len(batch["input_ids"]), batch.get("counts")
    examples = sequences if counts is None else len(counts)
    number = next((n for n in range(number, examples) if examples % n == 0), examples)
    each = [examples // number] * number
    rows = each if counts is None else [int(part.sum()) for part in counts.split(each)]
    same = {name: batch[name] for name in COMMON & batch.keys()}
    cut = {name: batch[name].split(rows if name in SEQUENCES else each) for name in batch.keys() - COMMON}
    return [same | {name: parts[i] for name, parts in cut.items()} for i in range(number)]


def _labels(item: Item, answer: list[int]) -> list[int]:
    labels = [IGNORE] * len(item.prompt)
    for start, end in item.earlier:
        labels[start:end] = item.prompt[start:end]
    return labels + answer


def _targets(items: Sequence[Item]) -> dict[str, Tensor]:
    return {"targets": torch.tensor([item.gold for item in items])}


def _pad(sequences: Sequence[list[int]], value: int) -> Tensor:
    width = max(map(len, sequences))
    return torch.tensor([[value] * (width - len(sequence)) + sequence for sequence in sequences])
