"""Guided: our own method, the left factor computed from the output error (zoft.optim.guided)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from zoft.optim.guided import Guided as GuidedEstimator
from zoft.optim.landscape import Closure
from zoft.optim.methods.zoact import HEADS
from zoft.optim.optimizer import ZeroOrder
from zoft.optim.subspace import Activation
from zoft.optim.update import Adam


class Guided(ZeroOrder):
    """Adam on coefficients whose gradient estimate comes from one clean forward pass, without probes.

    The first clean pass gives each linear layer (but the output head) A [d_in, r], an orthonormal basis of its inputs
    at the positions that the loss reads, r at most their number, and A stays, unless it is trained. Each step computes
    the coefficients' estimate from the error at the output (`zoft.optim.guided`) and hands it to Adam. Only matrices
    that the estimate reaches are trained. One forward a step (and a look at the model, once, to find the residual
    stream, which is not counted). The closure returns a loss that autograd can follow back to what the final norm gives
    (it records the head and the loss), or a `zoft.optim.Loss` that knows its slope at the logits (then nothing is
    recorded). `lr` is meant to fall to 0 over the run; `zoft train` has it fall linearly.

    ``train_bases=True`` trains A as well, by Adam and its own gradient, which the same way back gives: LoRA (arXiv
    2106.09685) without backpropagation, from the activations' leading directions instead of random ones, and one A for
    all layers that read the same input. The directions are whitened, and A moves at twice the rate of C.

    With ``into="weights"`` the steps are written into the weights, and the basis may be renewed every
    `renew_every` steps. ``attention=True`` carries the error through attention as well, to all tokens, whose inputs
    then give the bases, and trains the matrices that make queries, keys and values; each block runs once more as the
    error goes back, which makes two forwards of a step (three of the first, if a batch large for the model is taken in
    parts). Where few tokens are read, the others have little error, and most of them are left out of feed-forward
    parts: `energy` is the share of its square that goes back there. With 1, and in a model of which all is known in
    closed form, the estimate is the gradient itself, in the bases.
    With `attention_after` it does so in the first step, and then only after so many, when Adam's moments begin anew:
    those of the smaller estimates before would make its steps too large. ``feed_forward=False`` counts the stream as
    the identity, and then ``two_pass=True`` takes two forwards a step and keeps nothing for each layer
    (`zoft.optim.guided.Guided`).

    Raises:
        ValueError: `two_pass` with `feed_forward` or `attention`, `attention_after` without `attention`, `energy` not
            above 0 and up to 1, or `train_bases` with ``into="weights"``.
        NoStream: at the first estimate, if the model has no residual stream that ends in a norm, or `include` and
            `exclude` leave nothing that the estimate reaches.
        ValueError: at an estimate, if autograd cannot follow the loss, or the model runs more than once for it.
        NotRepeatable: at an estimate with `attention`, if a block, run again, gives something else (dropout).
    """

    estimator: GuidedEstimator

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        rank: int = 8,
        power_steps: int | None = 8,
        renew_every: int | None = None,
        feed_forward: bool = True,
        attention: bool = False,
        attention_after: int = 0,
        train_bases: bool = False,
        energy: float = 0.999,
        two_pass: bool = False,
        into: Literal["weights", "coefficients"] = "coefficients",
        exclude: tuple[str, ...] = HEADS,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            subspace=Activation(rank, power_steps, renew_every, read_only=not attention, whiten=train_bases),
            estimator=GuidedEstimator(feed_forward, attention, two_pass, attention_after, train_bases, energy),
            update=Adam(into=into, factored=True),
            exclude=exclude,
            **options,
        )

    def estimate(self, closure: Closure) -> Tensor:
        if self.counters.steps == self.estimator.attention_after:
            self.updates.clear()
            self.basis_updates.clear()
        return super().estimate(closure)
