"""The methods and the problems that the tests go through."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from zoft.optim import AGZO, AIMZO, LOZO, SGD, Activation, MeZO, Probes, ZeroOrder, ZOAct
from zoft.optim.noise import normal

from .models import llama, mlp, tied_llama, token_batch

METHODS: dict[str, Callable[..., ZeroOrder]] = {
    "MeZO": MeZO,
    "LOZO": LOZO,
    "LOZO-M": partial(LOZO, momentum=0.9),
    "AGZO": AGZO,
    "AGZO two-sided": partial(AGZO, two_sided=True),
    "AGZO rank 4": partial(AGZO, rank=4),
    "AGZO gaussian": partial(AGZO, others="gaussian"),
    "AGZO clipped": partial(AGZO, others="gaussian", clip=1.5),
    "AGZO folded": partial(AGZO, fold_every=3),
    "AIM-ZO": partial(AIMZO, rank=8, active=3, shared=1),
    "MeZO z-score": partial(MeZO, probes=2, shape="zscore"),
    "AGZO ranks": partial(AGZO, probes=4, leave_one_out=True, shape="rank"),
    "ZO-Act": ZOAct,
    "ZO-Act SGD": partial(ZOAct, adam=False),
    "hybrid": partial(
        ZeroOrder,
        subspace=Activation(renew_every=50),
        estimator=Probes(two_sided=True),
        update=SGD(momentum=0.9),
    ),
}


@dataclass(frozen=True)
class Problem:
    """A model to train and the closure of its loss."""

    model: nn.Module
    closure: Callable[[], Tensor]


def least_squares() -> Problem:
    """One linear layer; the inputs have a common mean, as activations do."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    x = normal((0, "x"), (32, 8)) + 2
    with torch.no_grad():
        model[0].weight.zero_()
    y = x @ normal((0, "w"), (8, 4))
    return Problem(model, lambda: mse_loss(model(x), y))


def classifier() -> Problem:
    """Three classes around centres of their own."""
    model, classes = mlp(), torch.arange(48) % 3
    x = normal((0, "x"), (48, 10)) + 2 * normal((0, "centres"), (3, 10))[classes]
    return Problem(model, lambda: cross_entropy(model(x), classes))


def language_model(build: Callable[[], nn.Module]) -> Problem:
    """Always say the same word."""
    model, batch = build(), token_batch(batch=4, length=6)
    batch["labels"] = torch.where(batch["labels"] < 0, -100, 7)
    return Problem(model, lambda: model(**batch).loss)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "least squares": least_squares,
    "classifier": classifier,
    "llama": partial(language_model, llama),
    "tied llama": partial(language_model, tied_llama),
}
