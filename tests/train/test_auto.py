"""What is settled where texts are learned, and blocks may give something else when they run again."""

from collections.abc import Callable
from itertools import count

import pytest
import torch

from optim.models import llama, token_batch
from zoft.optim import Loss, cross_entropy
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
    ("make", "texts", "through"), [(llama, True, True), (llama, False, False), (unrepeatable, True, False)]
)
def test_texts_are_learned_through_attention_where_blocks_can_run_again(
    make: Callable[[], torch.nn.Module], texts: bool, through: bool
) -> None:
    model = make()
    config, _ = settle(TrainConfig("tiny"), model, lambda: [closure_of(model)], texts)
    assert (config.method, config.method_options["attention"]) == ("guided", through)
    assert isinstance(config.lr, float)
