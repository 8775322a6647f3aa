"""A learning rate for guided, from what a step of Adam does to a layer.

Adam's first step moves every coefficient of ``C`` [d_out, r] by about lr, so that each entry of a layer's output y
moves by up to lr times ``sum |x A|``. How large that is beside y differs between models: at the same lr it is some five
times as much in Gemma-3-270m as in SmolLM2-135M, and so are the rates with which they begin to diverge. The rate is
therefore asked for as a relative change, that of the median layer, with one digit: a factor of three either way hardly
matters. It does where the way goes through attention, or bases are trained too, and few tokens are read (labels), which
leaves the estimates more noise: half of the change is asked for there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim import Guided
from zoft.optim.capture import Tokens
from zoft.optim.landscape import Closure
from zoft.optim.layers import input_of

CHANGE = 1e-2  # of a layer's output, by one step: 1e-3 for SmolLM2-135M, on all nine tasks that it was tried on


def guided_rate(optimizer: Guided, closure: Closure) -> float | None:
    """The rate at which a step of `optimizer` changes the output of the median layer by `CHANGE`, or half of it.

    Half if it goes through attention, or trains bases, and the loss reads less than half of the tokens. The change is
    that at the positions that the loss reads. `optimizer` has made an estimate, for which it took its bases; `closure`
    is called once more. None if no layer's output is finite.
    """
    tokens, everywhere, changes = Tokens(), Tokens(everywhere=True), []

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            basis, x, y = optimizer.branches.basis(name), tokens.read(input_of(args, kwargs)), tokens.read(output)
            if basis is not None and x is not None and y is not None:
                moved = (x.to(basis.device).float() @ basis).abs().sum(1).mean() * math.sqrt(y.shape[1])
                changes.append(float(moved / y.float().norm(dim=1).mean()))

        return hook

    with ExitStack() as handles, torch.no_grad():
        for looking in (tokens, everywhere):
            handles.callback(optimizer.model.register_forward_pre_hook(looking.see, with_kwargs=True).remove)
        for layer in optimizer.maps:
            for module in layer.modules:
                handles.callback(module.register_forward_hook(see(layer.name), with_kwargs=True).remove)
        closure()
    finite = [change for change in changes if math.isfinite(change) and change > 0]
    way = optimizer.estimator
    wanted = CHANGE / 2 if (way.attention or way.train_bases) and tokens.count < everywhere.count / 2 else CHANGE
    return float(f"{wanted / median(finite):.0e}") if finite else None
