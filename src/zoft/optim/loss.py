"""A loss that knows its slope at the logits, and the slope of any other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft.optim.layers import input_of

LARGE = 1 << 20  # logits that are held in float32 at a time
FINER = 1 << 10  # times as large are slopes in float16 meanwhile


class Loss(NamedTuple):
    """What a closure may return instead of a tensor, for methods that ask for more.

    `values` is the mean loss, or one loss per example [batch]; ``error()`` the gradient of their mean with respect to
    the logits that the model returned, in their shape, or in parts of some positions each, one after the other. Where
    an example is several sequences of the model's batch, `examples` int64 [sequences] says which example each belongs
    to.
    """

    values: Tensor
    error: Callable[[], Tensor | Iterable[Tensor]] | None = None
    examples: Tensor | None = None


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Loss:
    """The mean negative log-likelihood of the tokens `labels` [batch, tokens] of a causal model, with its error.

    `logits` [batch, K, vocabulary] are those at the final K positions, which predict the token after them. They are
    held in float32 some positions at a time.
    """
    following = F.pad(labels, (0, 1), value=ignore_index)[:, -logits.shape[1] :]
    together = max(1, LARGE // logits[:, 0].numel())
    parts = list(zip(logits.split(together, 1), following.split(together, 1), strict=True))
    count = (following != ignore_index).sum()

    def error() -> Iterator[Tensor]:
        for part, right in parts:
            wrong = part.detach().softmax(-1, dtype=torch.float32)
            wrong.scatter_add_(-1, right.clamp(min=0).unsqueeze(-1), -wrong.new_ones(*right.shape, 1))
            yield wrong.mul_(((right != ignore_index) / count.clamp(min=1)).unsqueeze(-1))

    losses = [
        F.cross_entropy(part.float().flatten(0, 1), right.flatten(), ignore_index=ignore_index, reduction="sum")
        for part, right in parts
    ]
    return Loss(torch.stack(losses).sum() / count, error)


@dataclass(frozen=True)
class Differentiated:
    """The losses of `closure`, any that autograd knows, with their slope at the end of the stream.

    That is what `end` gives the last of so many `times`. What is recorded begins there: what follows and the loss, and
    nothing of the blocks. As the slope is taken, `take` is handed the name of each module `behind` the end, its input
    [rows, d_in] and the slope at its output, float32 [rows, d_out].

    Raises:
        ValueError: when called, if autograd cannot follow the loss back to it, or `end` runs more often, or less.
    """

    closure: Callable[[], Any]
    end: nn.Module
    times: int
    behind: Mapping[str, nn.Module]
    take: Callable[[str, Tensor, Tensor], None]

    def __call__(self) -> Loss:
        given: list[Tensor] = []
        count = 0

        def record(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            nonlocal count
            count += 1
            if count % self.times:
                return None
            torch.set_grad_enabled(True)
            given.append(output.detach().requires_grad_())
            return given[-1]

        def see(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                x = rows(input_of(args, kwargs).detach())
                if output.requires_grad:
                    output.register_hook(lambda slope: self.take(name, x, rows(plain(slope))))

            return hook

        def rows(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1, tensor.shape[-1])

        def plain(slope: Tensor) -> Tensor:
            return slope.float() / scale()

        def scale() -> int:
            return FINER if given[0].dtype == torch.float16 else 1

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())  # until `end` has run, and after the closure again
            stack.callback(self.end.register_forward_hook(record).remove)
            for name, module in self.behind.items():
                stack.callback(module.register_forward_hook(see(name), with_kwargs=True).remove)
            loss = self.closure()
        loss = loss if isinstance(loss, Loss) else Loss(torch.as_tensor(loss))
        values = loss.values
        if count != self.times:
            raise ValueError(f"guided takes the slope of the loss of one forward pass, not of {count / self.times:g}")
        if not values.requires_grad:
            raise ValueError(
                "guided needs the slope of the loss, and autograd cannot follow it to the logits: return a tensor that "
                "comes from them, or a zoft.Loss that knows it"
            )

        def error() -> Tensor:
            weights = torch.full_like(values, scale() / values.numel())
            return plain(torch.autograd.grad(values, given[0], weights)[0])

        return loss._replace(error=error)
