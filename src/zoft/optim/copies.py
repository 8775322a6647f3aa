"""One forward pass for several calls with the same inputs: on a batch that holds it as many times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from zoft.optim.calls import replaced_forward, same_tensor

Inputs = list[Any]


@contextmanager
def repeated(model: nn.Module, count: int) -> Iterator[None]:
    """While open, `model` is called `count` times with the same inputs, and runs once, on `count` copies of the batch.

    The batch is the leading size of the first input with two dimensions or more; every input tensor with that leading
    size is repeated, every output with `count` times that size is cut, call n getting the n-th part.

    Raises:
        ValueError: the inputs of two calls differ, an output cannot be cut (a loss that the model took itself, a mean
            over all copies), the number of calls is another, or a dropout is active, which would tell copies apart.
    """
    if any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in model.modules()):
        raise ValueError("copies of a batch would have different dropout masks: call model.eval(), or run them apart")
    run, calls = model.forward, _Calls(count)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if calls.number == 0:
            calls.keep(run(*args, **kwargs))
        return calls.next()

    handle = model.register_forward_pre_hook(calls.repeat, with_kwargs=True)
    try:
        with replaced_forward(model, forward):
            yield
        if calls.number != count:
            raise ValueError(f"the closure must call the model once; {count} calls of it made {calls.number}")
    finally:
        handle.remove()


class _Calls:
    def __init__(self, count: int) -> None:
        self.count, self.number, self.batch = count, 0, 0
        self._inputs: Inputs = []
        self._outputs: list[Inputs] = []
        self._form: Any = None

    def repeat(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """The inputs of the first call, repeated; those of a later call must be the same."""
        inputs, form = tree_flatten((args, kwargs))
        if self.number == 0:
            batched = (x for x in inputs if isinstance(x, Tensor) and x.dim() >= 2)
            first = next(batched, None)
            if first is None:
                raise ValueError("no input has a batch and another dimension: there is nothing to repeat")
            self._inputs, self.batch = inputs, len(first)
            return tree_unflatten([self._repeated(x) for x in inputs], form)
        if len(inputs) != len(self._inputs) or not all(map(_same, inputs, self._inputs)):
            raise ValueError("the closure calls the model with other inputs each time: run its probes apart")
        return args, kwargs

    def keep(self, output: Any) -> None:
        """Cut what the model returned."""
        outputs, self._form = tree_flatten(output)
        self._outputs = [[self._part(x, number) for x in outputs] for number in range(self.count)]

    def next(self) -> Any:
        """What one more call returns."""
        if self.number == self.count:
            raise ValueError("the closure must call the model once: run its probes apart")
        self.number += 1
        return tree_unflatten(self._outputs[self.number - 1], self._form)

    def _repeated(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != self.batch:
            return x
        return x.repeat(self.count, *[1] * (x.dim() - 1))

    def _part(self, x: Any, number: int) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dim() == 0 or len(x) != self.count * self.batch:
            raise ValueError(
                f"an output of shape {list(x.shape)} cannot be told apart by copies of the batch; take the loss from "
                "the logits (zoft.cross_entropy), or run the probes apart"
            )
        return x[number * self.batch : (number + 1) * self.batch]


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return same_tensor(first, second)
    return not isinstance(first, Tensor) and not isinstance(second, Tensor)
