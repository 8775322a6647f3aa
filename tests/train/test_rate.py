"""Guided's measured rate, against what a step does."""

from functools import partial
from statistics import median

import pytest
import torch

from optim.models import ARCHITECTURES, llama, token_batch
from zoft.optim import Guided, Loss, cross_entropy
from zoft.optim.guided import Guided as GuidedEstimator
from zoft.train.rate import CHANGE, guided_rate


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt2"])
def test_a_step_changes_outputs_by_so_much(architecture: str) -> None:
    """Adam's first step moves coefficients by about lr; of the entries of an output that is at most lr |x A|."""
    model, batch = ARCHITECTURES[architecture][0](), token_batch()

    def closure(model: torch.nn.Module) -> Loss:
        return cross_entropy(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])

    optimizer = Guided(model)
    optimizer.estimate(partial(closure, model))
    rate = guided_rate(optimizer, partial(closure, model))
    assert rate is not None
    optimizer = Guided(model, lr=rate)
    optimizer.step(partial(closure, model))
    sizes = [float(factor.square().mean().sqrt()) for factor in optimizer.coefficients.values()]
    assert 0.5 * rate < median(sizes) < 1.5 * rate
    changes = []

    def see(name: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        basis, factor = optimizer.branches.basis(name), optimizer.coefficients.get(name)
        if basis is not None and factor is not None:
            added = args[0] @ basis @ factor.t()
            changes.append(float(added.norm(dim=-1).mean() / (output - added).norm(dim=-1).mean()))

    for layer in optimizer.maps:
        layer.modules[0].register_forward_hook(partial(see, layer.name))
    with torch.no_grad():
        closure(model)
    assert CHANGE / 6 < median(changes) < 1.6 * CHANGE  # signs cancel in part; the rate has one digit


@pytest.mark.parametrize(("keep", "share"), [(3, 0.5), (9, 1.0)])  # of ten tokens, the last ones
@pytest.mark.parametrize("options", [{"attention": True}, {"train_bases": True}, {}])
def test_further_ways_on_few_tokens_are_asked_for_half_the_change(
    options: dict[str, bool], keep: int, share: float
) -> None:
    model, ids = llama(), token_batch()["input_ids"]

    def closure() -> Loss:
        return cross_entropy(model(ids, logits_to_keep=keep).logits, ids)

    optimizer = Guided(model, **options)
    optimizer.estimate(closure)
    found = guided_rate(optimizer, closure)
    optimizer.estimator = GuidedEstimator()
    expected = guided_rate(optimizer, closure)
    assert found is not None and expected is not None
    assert 0.65 * share < found / expected < 1.35 * share if options else found == expected  # each has one digit
