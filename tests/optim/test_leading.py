"""Blocks before the first that moves run once a step: the same training, for less."""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, MixtralConfig

from zoft.optim import AGZO, AIMZO, LOZO, MeZO, ZeroOrder, ZOAct
from zoft.optim.noise import normal

from .models import GROUPED, build, gemma3, gpt2, llama, opt, token_batch, token_losses

THREE = {"num_hidden_layers": 3}
LATE = ("*.1.*", "*.2.*")
LATEST = partial(AGZO, include=["*.2.*"])
METHODS: dict[str, Callable[..., ZeroOrder]] = {
    "AGZO per example": partial(AGZO, probes=3, per_example=True),
    "AGZO every other step": partial(AGZO, two_sided=True, renew_every=2),
    "AGZO gaussian": partial(AGZO, others="gaussian"),
    "AIM-ZO": partial(AIMZO, rank=8, active=3, shared=1, probes=3),
    "ZO-Act": partial(ZOAct, probes=2),
    "LOZO": LOZO,
    "MeZO": MeZO,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": partial(llama, **THREE),
    "mixtral": lambda: build(MixtralConfig(**{**GROUPED, **THREE}, num_local_experts=3)),
}


def runs_of(model: nn.Module) -> Counter[int]:
    """How often each entry of the model's list of blocks has really run."""
    counts: Counter[int] = Counter()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for i, block in enumerate(blocks):
        next(block.children()).register_forward_hook(lambda *_, i=i: counts.update([i]))
    return counts


def trained(
    make: Callable[[], nn.Module], method: Callable[..., ZeroOrder], losses: Callable[[nn.Module], Tensor], reuse: bool
) -> tuple[list[float], dict[str, Tensor], Counter[int], ZeroOrder]:
    model = make()
    optimizer = method(model, lr=1e-3, eps=1e-3)
    if not reuse:
        optimizer.leading.sound = False
    counts = runs_of(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [float(optimizer.step(lambda: losses(model)) or 0) for _ in range(4)]
    return found, {**model.state_dict(), **optimizer.coefficients}, counts, optimizer


def same_training(
    make: Callable[[], nn.Module], method: Callable[..., ZeroOrder], losses: Callable[[nn.Module], Tensor]
) -> tuple[Counter[int], ZeroOrder]:
    """Whether every number of the training is the same as where all blocks run at all points; how often they ran."""
    found, weights, counts, optimizer = trained(make, method, losses, True)
    expected, others, _, plain = trained(make, method, losses, False)
    assert found == expected
    assert optimizer.counters == plain.counters
    assert all(torch.equal(weights[name], others[name]) for name in others)
    assert not optimizer.leading._calls
    return counts, optimizer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_the_same_training_with_leading_blocks_run_once_a_step(model: str, method: str) -> None:
    batch = token_batch(batch=3)
    counts, optimizer = same_training(
        MODELS[model], partial(METHODS[method], include=LATE), lambda model: token_losses(model, batch)
    )
    assert optimizer.leading.sound
    assert counts[0] == 4  # once in each of the steps; the first looks at itself twice, and takes it from there
    assert counts[1] == counts[2] == optimizer.counters.forwards + 2


@pytest.mark.parametrize("make", [gpt2, opt, gemma3])
def test_of_other_architectures(make: Callable[[], nn.Module]) -> None:
    batch = token_batch(batch=3)
    counts, optimizer = same_training(make, partial(AGZO, include=["*.1.*"]), lambda model: token_losses(model, batch))
    assert optimizer.leading.sound
    assert counts == {0: 4, 1: 10}


def test_calls_of_the_model_in_a_pass_are_kept_apart() -> None:
    batches = [token_batch(batch=3), token_batch(batch=2, seed=1)]
    counts, _ = same_training(
        MODELS["llama"],
        partial(AGZO, include=LATE),
        lambda model: torch.cat([token_losses(model, batch) for batch in batches]),
    )
    assert counts == {0: 8, 1: 20, 2: 20}


def test_a_moving_embedding_leaves_nothing_to_reuse() -> None:
    batch = token_batch(batch=3)
    method = partial(LOZO, include=("*embed_tokens", "*.2.*"))
    counts, _ = same_training(MODELS["llama"], method, lambda model: token_losses(model, batch))
    assert counts == {0: 9, 1: 9, 2: 10}


def test_nothing_is_reused_where_all_blocks_move_or_none_does() -> None:
    model = llama(**THREE)
    assert not AGZO(model).leading.blocks
    assert not AGZO(model, include=["lm_head"]).leading.blocks
    assert [*AGZO(model, include=["*.2.*"]).leading.blocks] == [*model.model.layers[:2]]


def test_nothing_is_reused_beside_a_cache() -> None:
    """A block of a model that generates reads what an earlier call has left in the cache, not its arguments alone."""
    batch = token_batch(batch=3)

    def losses(model: nn.Module) -> Tensor:
        cache = DynamicCache()
        model(input_ids=batch["input_ids"][:, :2], past_key_values=cache)
        logits = model(input_ids=batch["input_ids"][:, 2:3], past_key_values=cache).logits
        return logits.logsumexp(-1)[:, 0]

    counts, optimizer = same_training(MODELS["llama"], LATEST, losses)
    assert not optimizer.leading.sound
    assert counts[0] == counts[2]


def test_nothing_is_reused_in_train_mode() -> None:
    """A dropout's mask is the same at all points as long as what was drawn before it is."""
    batch, first, calls = token_batch(batch=3), 4, iter(range(100))

    def losses(model: nn.Module) -> Tensor:
        model.train(next(calls) >= first)
        return token_losses(model, batch)

    found = []
    for reuse in (True, False):
        calls, first = iter(range(100)), 4 if reuse else 2  # of the first step, whose look at itself takes two
        found.append(trained(lambda: llama(**THREE, attention_dropout=0.5), LATEST, losses, reuse))
    (losses_found, _, counts, optimizer), (expected, *_) = found
    assert optimizer.leading.sound
    assert losses_found == expected
    assert counts == {0: 7, 1: 7, 2: 10}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("training, factor", [(True, 1.0), (False, math.nan)], ids=["train mode", "nan"])
def test_a_first_step_that_shows_nothing_is_no_verdict(training: bool, factor: float) -> None:
    """Once a first step in train mode, or whose loss was not a number, had all blocks run at all points for ever."""
    model, batch = llama(**THREE), token_batch(batch=3)
    optimizer, counts = LATEST(model), runs_of(model)
    model.train(training)
    optimizer.step(lambda: token_losses(model, batch) * factor)
    assert optimizer.leading.sound is None
    model.eval()
    optimizer.step(lambda: token_losses(model, batch))
    counts.clear()
    optimizer.step(lambda: token_losses(model, batch))
    assert optimizer.leading.sound and counts == {0: 1, 1: 1, 2: 2}


class Odd(nn.Module):
    """Three blocks; does something besides handing on what they return."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.what = what
        for i, parameter in enumerate(self.parameters()):
            parameter.data = normal((i, "odd"), parameter.shape)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        start = x
        for i, block in enumerate(self.blocks):
            y = block(x)
            if self.what == "adds between blocks" and i == 0:
                y = y + start
            if self.what == "adds in place" and i == 2:
                x += 1
            if self.what == "reads an inner block" and i == 0:
                start = start + y
            x = y
        return (x + start).square().mean(-1)


@pytest.mark.parametrize(
    "what, shows", [("adds between blocks", False), ("adds in place", True), ("reads an inner block", True)]
)
def test_nothing_is_reused_where_it_shows_in_the_loss(what: str, shows: bool) -> None:
    x = normal((0, "x"), (5, 4))
    _, optimizer = same_training(partial(Odd, what), partial(AGZO, include=["blocks.2.*"]), lambda model: model(x))
    assert optimizer.leading.sound is not shows


def test_blocks_are_left_as_they_were() -> None:
    model, batch = llama(**THREE), token_batch(batch=3)
    first, own = model.model.layers[0], model.model.layers[1].forward
    model.model.layers[1].forward = own
    optimizer = AGZO(model, include=["*.2.*"])
    optimizer.step(lambda: token_losses(model, batch))

    def fails() -> Any:
        token_losses(model, batch)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        optimizer.step(fails)
    assert "forward" not in vars(first)
    assert model.model.layers[1].forward is own
    assert not optimizer.leading._calls
