"""The optimizer: a subspace, an estimator and an update, behind the interface of ``torch.optim.Optimizer``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoft.optim import check, checkpoint
from zoft.optim.apply import add, apply, rounding_key
from zoft.optim.capture import Basis, captured
from zoft.optim.counters import Counters
from zoft.optim.estimator import Estimate, Estimator, Probes
from zoft.optim.guided import Guided
from zoft.optim.landscape import Closure, Landscape, uncompiled
from zoft.optim.layers import LinearMap, find_linear_maps, other_parameters
from zoft.optim.leading import LeadingBlocks, blocks_before
from zoft.optim.noise import Key
from zoft.optim.pace import Pace
from zoft.optim.pending import Pending
from zoft.optim.placement import take_over
from zoft.optim.probe import SideBranches
from zoft.optim.ranks import Parallel, Ranks
from zoft.optim.subspace import Activation, Full, Maintained, RandomLowRank, Subspace, change_of_basis
from zoft.optim.trace import Trace, trace_of
from zoft.optim.update import SGD, State, Update


class ZeroOrder(torch.optim.Optimizer):
    """Zeroth-order optimizer: a point on the three axes *subspace*, *estimator*, *update*.

    The published methods are presets of it (``zoft.AGZO``, ``zoft.MeZO``, ...); compose it yourself for hybrids::

        optimizer = zoft.ZeroOrder(model, lr=1e-4, subspace=Activation(rank=1, renew_every=50),
                                   estimator=Probes(two_sided=True), update=SGD(momentum=0.9))
        loss = optimizer.step(lambda: model(**batch).loss)

    A closure runs the model forward once and returns its mean loss, or one loss per example (shape [batch]). It is
    called under ``torch.no_grad``, several times per step, each time with the same global random state (one
    dropout mask), which ends up as if it had been called once. `estimate` changes no parameter and no buffer, except
    what the model's own forward changes: a BatchNorm in train mode counts every pass.

    Args:
        model: any module; padding is recognised from the ``attention_mask`` keyword of its forward.
        lr: learning rate, at least 0.
        eps: distance of a probe from the centre (the papers' mu or epsilon), above 0.
        subspace, estimator, update: the axes.
        others: ``"frozen"``, or ``"gaussian"`` to perturb with dense noise whatever has no basis (norms, biases,
            embeddings), as AGZO's paper does. `Full` perturbs every parameter anyway.
        weight_decay: decoupled, on written weights but those of one dimension, norms and biases (and on coefficients,
            where those are trained).
        fold_every: steps whose updates of weights with a basis are summed in float32 beside them, as side branches, and
            then written together, which rounds half-precision weights less often. In between the model computes with
            both; `state_dict` of the model or of the optimizer writes first, and so does `fold`, for whatever reads the
            weights in another way. Weights shrink by `weight_decay` as they are written.
        clip, normalise: bound or even out the size of estimates from probes (`zoft.optim.pace.Pace`).
        probe_batching: evaluate a step's points in one forward, on as many copies of the batch
            (`zoft.optim.copies.repeated`): faster where reading the weights takes the time, small batches of short
            texts, for the memory of the larger batch. The same numbers, but for rounding.
        parallel: what the processes of ``torch.distributed`` share, if it is initialised: ``"data"``, each has a part
            of the batch, or ``"probes"``, all have the same and evaluate different probes of it; or both, by so many
            groups that share the probes, and in each of which the processes share the batch (`zoft.optim.ranks`).
            They exchange losses, and for bases from activations small products, and take the same step.
        seed: names all noise; runs with equal seeds draw equal directions.
        include, exclude: shell-style patterns on module or parameter names.
        linear: patterns that name further modules to be treated as linear maps.

    Raises:
        ValueError: an argument is out of its range, the axes do not fit together, or weights lie where the method
            cannot use them (`zoft.optim.placement`).
        NoLinearLayers: there is nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        eps: float = 1e-3,
        subspace: Subspace,
        estimator: Estimator | None = None,
        update: Update | None = None,
        others: Literal["frozen", "gaussian"] = "frozen",
        weight_decay: float = 0.0,
        fold_every: int = 1,
        clip: float | None = None,
        normalise: bool = False,
        probe_batching: bool = False,
        parallel: Parallel = "data",
        seed: int = 0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        linear: Sequence[str] = (),
    ) -> None:
        self.subspace, self.estimator, self.update = subspace, estimator or Probes(), update or SGD()
        self.model, self.others, self.seed, self.pace = model, others, int(seed), Pace(clip, normalise)
        self.ranks = Ranks(parallel)
        self.probe_batching, self.fold_every, self.pending = probe_batching, fold_every, Pending()
        check.numbers(lr, eps, weight_decay)
        check.patterns(include=include, exclude=exclude, linear=linear)
        check.axes(subspace, self.estimator, self.update, others)
        check.folding(fold_every, subspace, self.estimator, self.update)
        check.probing(subspace, self.estimator, others, clip=clip, normalise=normalise, batching=probe_batching)

        self.sharded = take_over(model)
        if self.sharded:
            check.sharded(self.ranks, self.estimator)
        self.maps: list[LinearMap] = []
        self.dense: dict[str, nn.Parameter] = {}
        if not isinstance(subspace, Full):
            self.maps = find_linear_maps(
                model,
                include=include,
                exclude=exclude,
                linear=linear,
                embeddings=subspace.embeddings,
                experts=isinstance(self.estimator, Probes),  # no other estimate reaches them
            )
        if isinstance(subspace, Full) or others == "gaussian":
            self.dense = other_parameters(model, self.maps, include=include, exclude=exclude)
        check.ranks(self.ranks, self.estimator, self.maps)
        if not self.keeps_coefficients:
            check.writable(model, self.maps, self.dense, self.update)
        weights = {id(m.parameter): m.parameter for m in self.maps if m.parameter is not None}
        parameters = [*weights.values(), *self.dense.values()]
        if self.keeps_coefficients and not parameters:  # all quantized; torch wants something in its groups
            parameters = [*model.parameters()]
        if not parameters:
            raise ValueError(f"{type(model).__name__} has no parameter to train")
        super().__init__(parameters, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

        # Other estimates look into the passes, and processes that have shards gather them together, in every block.
        apart = isinstance(self.estimator, Probes) and not self.sharded
        self.leading = LeadingBlocks(blocks_before(model, self.maps, self.dense.values()) if apart else [])
        self.branches = SideBranches(self.maps)
        self.branches.pending = self.pending.sums
        self.coefficients: dict[str, Tensor] = {}
        if self.keeps_coefficients:
            self.branches.factors = self.coefficients
        if self.stays_attached:
            self.branches.attach()
        if fold_every > 1:
            model.register_state_dict_pre_hook(lambda *_: self.fold())
            model.register_load_state_dict_pre_hook(lambda *_: self.fold())
        self.counters = Counters()
        self.loss, self.projected_gradients = math.nan, []  # type: float, list[float]
        self.updates: dict[str, State] = {}  # what the update rule keeps, by map or parameter name
        self.basis_updates: dict[str, State] = {}  # the same for trained bases, by the first map that has it
        self.renewed_at: int | None = None  # step of the last renewal
        self.traces: list[Trace] = []  # of the estimates since the last step
        self._drawn = 0  # directions drawn in this step
        self.unused: Set[str] = set()  # dense parameters that the last estimate's passes did not read
        self._estimate: Estimate | None = None
        self._warned: set[str] = set()

    @property
    def keeps_coefficients(self) -> bool:
        """Whether updates are summed as coefficients C beside frozen weights, instead of written into them."""
        return self.update.into == "coefficients"

    @property
    def stays_attached(self) -> bool:
        """Whether the side branches are part of the model between steps."""
        return self.keeps_coefficients or self.fold_every > 1

    @property
    def trains_bases(self) -> bool:
        """Whether bases move with the coefficients."""
        return isinstance(self.estimator, Guided) and self.estimator.train_bases

    @property
    def bases(self) -> dict[str, Tensor]:
        """The basis A, float32 [d_in, r], of each linear map by name."""
        return self.branches.bases

    @property
    def confine(self) -> Callable[[Tensor, Key], Tensor] | None:
        """What restricts a probe's left factor to the columns that it uses; None if it uses all."""
        return self.subspace.confine if isinstance(self.subspace, Maintained) else None

    # --- estimate and step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def estimate(self, closure: Closure) -> Tensor:
        """Estimate the gradient on the closure's batch and add it to those not stepped on yet; return the loss.

        What ``loss.backward()`` is to a first-order optimizer. Several calls before one `step` are averaged; they
        share the bases of the first, and each draws directions of its own.
        """
        check.ranks(self.ranks, self.estimator, self.maps)
        check.unmoved(self.model, self.sharded)
        subspace, key = self.subspace, (self.seed, self.counters.steps)
        self.draw_bases()
        capture = None
        if self._due and isinstance(subspace, Activation):
            capture = self._capture()
        landscape = Landscape(
            self.model,
            closure,
            self.param_groups[0]["eps"],
            self.branches,
            self.dense,
            key,
            self._drawn,
            capture,
            self.renew_bases,
            self.confine,
            self.probe_batching,
            self.leading,
            self.ranks,
        )
        found = Estimate()
        self.branches.shared.clear()  # another batch may lie in another way
        with self.leading.one_batch():
            self.loss, gradients = self.estimator(landscape, found)
        self.counters.forwards += landscape.forwards
        self._drawn = landscape.drawn
        unread = self.dense.keys() - landscape.used
        self.traces.append(trace_of(self, found, unread))
        add(self, found, gradients, unread)
        return torch.tensor(self.loss)

    @torch.no_grad()
    def calibrate(self, *closures: Closure) -> None:
        """Take the bases from the activations of all these batches together, one forward each, and keep them.

        Without it, the first estimate that finds the bases due takes them from its own batch.

        Raises:
            ValueError: the subspace does not come from activations.
        """
        if not isinstance(self.subspace, Activation):
            raise ValueError(f"{type(self).__name__} takes no basis from activations")
        with uncompiled(), self._capture()(1) as bases:
            for closure in closures:
                closure()
        self.counters.forwards += len(closures)
        self.renew_bases(bases)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Estimate, if a `closure` is given, and move along the mean of the estimates since the last step.

        Returns the loss that the closure gave at the centre. Of two-sided probes and of leave-one-out, which make no
        pass there unless a basis is due or examples have directions of their own, it is the mean over all probes.

        Raises:
            RuntimeError: there is neither a closure nor an estimate.
        """
        loss = None if closure is None else self.estimate(closure)
        if self._estimate is None:
            raise RuntimeError("nothing to step on: call estimate(closure) first, or step(closure)")
        if self._estimate.count:
            apply(self, self._estimate)
        self.take_estimate()
        return loss

    def take_estimate(self) -> Estimate | None:
        """Hand over the estimate since the last step without moving, and go on to the next step's noise."""
        estimate, self._estimate, self._drawn, self.traces = self._estimate, None, 0, []
        self.counters.steps += 1
        return estimate

    @torch.no_grad()
    def fold(self) -> None:
        """Write into the weights what is still beside them; for when they are read in another way than by running."""
        self.pending.write(self.maps, rounding_key(self))

    # --- bases ---------------------------------------------------------------------------------------------

    def draw_bases(self) -> None:
        """Draw new bases, if they are random and due."""
        if isinstance(self.subspace, RandomLowRank) and self._due:
            self.set_bases(self.subspace.draw(self.maps, (self.seed, self.counters.steps)))

    @property
    def _due(self) -> bool:
        return not isinstance(self.subspace, Full) and self.subspace.due(self.counters.steps, self.renewed_at)

    def _capture(self) -> Callable[[int], AbstractContextManager[dict[str, Basis]]]:
        subspace = self.subspace
        assert isinstance(subspace, Activation)
        key = (self.seed, self.counters.steps)

        def extract(layer: LinearMap, rows: Tensor) -> Basis:
            return subspace.extract(rows, key, self.bases.get(layer.name), self.ranks)

        return partial(captured, self.model, self.maps, extract, subspace.read_only)

    def renew_bases(self, found: dict[str, Basis]) -> None:
        """Take the bases that a clean pass has found."""
        assert isinstance(self.subspace, Activation)
        self.set_bases(self.subspace.bases(found))

    def set_bases(self, bases: dict[str, Tensor]) -> None:
        """Move in these bases (float32 [d_in, r], by map name) from now on; maps without one stay still."""
        for name, new in bases.items():
            state, old = self.updates.get(name), self.bases.get(name)
            if old is None or not (state or name in self.coefficients):
                continue  # nothing is expressed in the old basis
            change = change_of_basis(old, new)
            if state:
                self.update.transport(state, change)
            if name in self.coefficients:
                self.coefficients[name] = self.coefficients[name] @ change
        self.bases.update(bases)
        self.basis_updates.clear()
        self.branches.active = [m for m in self.maps if m.name in bases]
        self.renewed_at = self.counters.steps
        if self.keeps_coefficients:
            for m in self.branches.active:
                rank = bases[m.name].shape[1]
                self.coefficients.setdefault(m.name, bases[m.name].new_zeros(m.d_out, rank))

    # --- checkpoints ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that continuing needs besides the model. An estimate not stepped on yet is not part of it."""
        self.fold()
        return checkpoint.pack(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`. Tensors keep their dtype (float32), whatever that of the weights.

        Raises:
            ValueError: it belongs to another model, or to a method of another kind.
        """
        checkpoint.unpack(self, state_dict)
        self.pending.clear()
        self._estimate, self._drawn, self.traces = None, 0, []

    def _warn(self, kind: str, message: str, category: type[Warning] = UserWarning) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{message} (step {self.counters.steps}; said once, counted on)", category, stacklevel=5)
