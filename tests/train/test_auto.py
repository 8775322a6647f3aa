"""What is settled where the whole way back is worth its time, and blocks may give something else in a second run."""

from collections.abc import Callable
from itertools import count

import pytest
import torch

from optim.models import llama, token_batch
from zoft.optim import Loss, cross_entropy
from zoft.optim.layers import find_linear_maps
from zoft.train.auto import settle
from zoft.train.config import TrainConfig


def closure_of(model: torch.nn.Module) -> Callable[[], Loss]:
    batch = token_batch()
    return lambda: cross_entropy(
        model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
    )


def unrepeatable() -> torch.nn.Module:
    model, runs = llama(), count(1)
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * next(runs))
    return model


@pytest.mark.parametrize(
    ("make", "whole", "through"), [(llama, True, True), (llama, False, False), (unrepeatable, True, False)]
)
def test_the_whole_way_is_gone_where_blocks_can_run_again(
    make: Callable[[], torch.nn.Module], whole: bool, through: bool
) -> None:
    model = make()
    config, _ = settle(TrainConfig("tiny"), model, lambda: [closure_of(model)], whole)
    assert (config.method, config.method_options["attention"]) == ("guided", through)
    assert config.method_options["train_bases"] is through
    assert isinstance(config.lr, float)


@pytest.mark.parametrize("method", ["auto", "guided"])
def test_the_rate_is_measured_where_an_adapter_has_come(method: str) -> None:
    model, generator = llama(), torch.Generator().manual_seed(0)
    maps = [m for m in find_linear_maps(model) if m.name != "lm_head"]
    adapter = {
        m.name: (torch.randn(m.d_in, 2, generator=generator), torch.randn(m.d_out, 2, generator=generator))
        for m in maps
    }
    wanted = TrainConfig("tiny", method=method, lr="auto")
    before, start = (
        settle(wanted, model, lambda: [closure_of(model)], adapter=known)[0].lr for known in (None, adapter)
    )
    for m in maps:
        basis, factor = adapter[m.name]
        m.weight.data.add_(factor @ basis.t())
    assert start == settle(wanted, model, lambda: [closure_of(model)])[0].lr != before
