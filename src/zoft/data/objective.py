"""Losses and predictions from logits, as functions of the logits and a batch of `Collator`.

A causal model's logits at a position predict the token after it. The functions take them at the last K
positions, `logits` [N, K, V] of any floating type, for any K from `positions_to_keep` up, and compute in float32.
Those of long answers and texts may be `LateLogits`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collate import IGNORE

Batch = Mapping[str, Tensor]

LARGE = 1 << 20  # logits that are held in float32 at a time
TOGETHER = 16  # as many times more that are made at once, since reading the head's weight takes long too


class LateLogits:
    """The logits [N, K, V] that `head` makes of `hidden` [N, K, d], made some positions at a time as they are read.

    Those of all tokens would be the largest thing in memory. They are made anew each time.
    """

    def __init__(self, head: nn.Linear, hidden: Tensor) -> None:
        self._head, self._hidden = head, hidden
        self.shape = (*hidden.shape[:2], head.out_features)

    def split(self, positions: int, dim: int = 1) -> Iterator[Tensor]:
        """Parts of so many positions each, one after the other."""
        for hidden in self._hidden.split(TOGETHER * positions, dim):
            yield from self._head(hidden).split(positions, dim)


Logits = Tensor | LateLogits


def positions_to_keep(batch: Batch) -> int:
    """K, the number of final positions whose logits the other functions need.

    Without labels, what is predicted follows the prompt: the last position alone. With labels, the positions from
    the one before the batch's first answer token up to the last, which predicts nothing but cannot be left out:
    one more than the longest answer has tokens.
    """
    if "labels" not in batch:
        return 1
    answer = (batch["labels"] != IGNORE).any(0)
    return answer.numel() - int(answer.int().argmax()) + 1


@overload
def read_logits(model: nn.Module, batch: Batch, head: None = None) -> Tensor: ...
@overload
def read_logits(model: nn.Module, batch: Batch, head: nn.Linear | None) -> Logits: ...
def read_logits(model: nn.Module, batch: Batch, head: nn.Linear | None = None) -> Logits:
    """The logits [N, K, V] that `losses` and `choose` need of `batch`, by one forward of a transformers model.

    `head` is the module that makes them, if it is known and nothing is done to what it gives. Then those of long
    answers and texts are `LateLogits`, unless hooks on the head or autograd want all at once.
    """
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    inputs |= {"logits_to_keep": positions_to_keep(batch), "use_cache": False}
    count = len(batch["input_ids"]) * inputs["logits_to_keep"]
    late = "labels" in batch and head is not None and count * head.out_features > TOGETHER * LARGE
    if head is None or not late or _is_watched(head):
        return model(**inputs).logits
    with _passing_on(head):
        found = model(**inputs).logits
    return found if found.shape[2] == head.out_features else LateLogits(head, found)  # compiled code has its own head


def _is_watched(head: nn.Linear) -> bool:
    patched = "forward" in vars(head)
    return patched or bool(head._forward_hooks or head._forward_pre_hooks) or torch.is_grad_enabled()


@contextmanager
def _passing_on(head: nn.Linear) -> Iterator[None]:
    """While open, `head` gives what it is given."""
    head.forward = nn.Identity().forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def losses(logits: Logits, batch: Batch) -> Tensor:
    """The loss of each example, float32 [B].

    With candidates to choose from: the cross-entropy of the right one under a softmax of their scores (see
    `choose`). With one answer: the mean negative log-likelihood of its tokens.

    Or the expected shortfall of an answer that the model gives: the mean of `shortfalls` [B, C], what each candidate
    falls short of the best, under that softmax; or of answers drawn, the mean of `drawn` [N].
    """
    if "shortfalls" in batch:
        return _over_candidates(_scores(logits, batch), batch)
    if "targets" in batch:
        return F.cross_entropy(_scores(logits, batch), batch["targets"], reduction="none")
    if "drawn" in batch:
        return _over_answers(logits, batch)
    return -_log_likelihoods(logits, batch["labels"]) / (batch["labels"] != IGNORE).sum(1)


def examples(batch: Batch) -> Tensor | None:
    """The example that each of the batch's sequences belongs to, int64 [N]; None if they are the same, N = B."""
    return _places(batch["counts"])[0] if "counts" in batch else None


def slope(logits: Logits, batch: Batch) -> Iterator[Tensor]:
    """The gradient of the mean of `losses` with respect to `logits` [N, K, V], in closed form.

    That of an expected value over answers drawn is estimated: every answer's log-likelihood is weighed by how much
    more it falls short than the others of its prompt (the score function with a baseline; Kool, van Hoof and Welling,
    "Buy 4 REINFORCE samples, get a baseline for free!", 2019), which is unbiased.

    Float32, in parts of some positions each [N, k, V], one after the other: the whole would be the largest thing in
    memory.
    """
    if "label_words" in batch:
        assert isinstance(logits, Tensor)  # at one position
        wrong = torch.zeros_like(logits, dtype=torch.float32)
        wrong[:, -1].index_add_(1, batch["label_words"], _choice_errors(_scores(logits, batch), batch))
        yield wrong
        return
    following = _following(logits, batch["labels"])
    answered = following != IGNORE
    if "targets" in batch:  # of each sequence's log-likelihood
        errors = _choice_errors(_scores(logits, batch), batch)[_places(batch["counts"])] / batch["norms"]
    elif "drawn" in batch:
        errors = _advantages(batch) / len(answered)
    else:
        errors = -1 / (answered.sum(1) * len(answered))
    errors = (answered * errors.unsqueeze(1)).unsqueeze(2)
    for part, right, error in _in_parts(logits, following.clamp(min=0).unsqueeze(2), errors):
        wrong = part.detach().softmax(-1, dtype=torch.float32).neg_()
        yield wrong.scatter_add_(2, right, torch.ones_like(right, dtype=torch.float32)).mul_(error)


def choose(logits: Logits, batch: Batch) -> Tensor:
    """The index of the candidate with the highest score, int64 [B]; for batches with `targets`.

    A label word's score is its logit; a sequence's score is its answer's log-probability, divided by its norm.
    """
    return _scores(logits, batch).argmax(1)


def _scores(logits: Logits, batch: Batch) -> Tensor:
    """The scores of each example's candidates [B, C], -inf where an example has fewer than C."""
    if "label_words" in batch:
        assert isinstance(logits, Tensor)
        return logits[:, -1, batch["label_words"]].float()
    counts = batch["counts"]
    scores = torch.full((len(counts), int(counts.max())), -torch.inf, device=counts.device)
    scores[_places(counts)] = _log_likelihoods(logits, batch["labels"]) / batch["norms"]
    return scores


def _places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each sequence, its example and its place among that example's candidates."""
    examples = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return examples, torch.arange(len(examples), device=counts.device) - (counts.cumsum(0) - counts)[examples]


def _choice_errors(scores: Tensor, batch: Batch) -> Tensor:
    """The gradient of the mean of `losses` with respect to `scores` [B, C]."""
    if "shortfalls" in batch:
        above = batch["shortfalls"] - _over_candidates(scores, batch).unsqueeze(1)
        return scores.softmax(1) * above / len(scores)
    right = F.one_hot(batch["targets"], scores.shape[1])
    return (scores.softmax(1) - right) / len(scores)


def _over_candidates(scores: Tensor, batch: Batch) -> Tensor:
    """The expected shortfall of each example's candidates [B]."""
    return (scores.softmax(1) * batch["shortfalls"]).sum(1)


def _advantages(batch: Batch) -> Tensor:
    """How much more each answer drawn [N] falls short than the mean of the others of its prompt."""
    of, counts = _places(batch["counts"])[0], batch["counts"]
    others = _sums(batch["drawn"], batch)[of] - batch["drawn"]
    return batch["drawn"] - others / (counts[of] - 1)


def _over_answers(logits: Logits, batch: Batch) -> Tensor:
    """The mean of the answers drawn for each example [B], whose gradient, if it is recorded, is that of `slope`."""
    each = batch["drawn"]
    if isinstance(logits, Tensor) and logits.requires_grad:
        likely = _log_likelihoods(logits, batch["labels"])
        each = each + _advantages(batch) * (likely - likely.detach())
    return _sums(each, batch) / batch["counts"]


def _sums(each: Tensor, batch: Batch) -> Tensor:
    """Over the sequences of each example [B]."""
    return each.new_zeros(len(batch["counts"])).index_add(0, _places(batch["counts"])[0], each)


def _log_likelihoods(logits: Logits, labels: Tensor) -> Tensor:
    """The summed log-probability of each sequence's answer [N]."""
    found = [
        F.cross_entropy(part.float().flatten(0, 1), right.flatten(), ignore_index=IGNORE, reduction="none")
        for part, right in _in_parts(logits, _following(logits, labels))
    ]
    return -torch.cat([part.view(len(labels), -1) for part in found], 1).sum(1)


def _following(logits: Logits, labels: Tensor) -> Tensor:
    """The tokens that the logits predict [N, K]; the last of them none."""
    return F.pad(labels, (0, 1), value=IGNORE)[:, -logits.shape[1] :]


def _in_parts(logits: Logits, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All of them in parts of some positions each, of no more than `LARGE` logits."""
    together = max(1, LARGE // (logits.shape[0] * logits.shape[2]))
    return zip(*(tensor.split(together, 1) for tensor in (logits, *others)), strict=True)
