"""Prompts read once for all their candidates, against every sequence read whole."""

from typing import Any

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from optim.models import ARCHITECTURES
from zoft.data import Collator, Item, choose, losses, read_candidates, read_logits

PAD, GENERATOR = 0, torch.Generator().manual_seed(0)


def tokens(count: int) -> list[int]:
    return torch.randint(3, 60, (count,), generator=GENERATOR).tolist()


def items(kind: str, prompts: tuple[int, ...], most: int = 4) -> list[Item]:
    """Examples with prompts of these lengths, and two to six candidates of up to `most` tokens."""
    return [
        Item(index, tokens(length), [tokens(1 + n % most) for n in range(2 + index % 5)], 1, False, kind)
        for index, length in enumerate(prompts)
    ]


class Seen:
    """Counts the tokens that a model reads."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tokens = 0
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        self.tokens += kwargs["input_ids"].numel()


@pytest.mark.parametrize("kind", ["choice", "classification"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_same_losses_and_choices_with_fewer_tokens(architecture: str, kind: str) -> None:
    model = ARCHITECTURES[architecture][0]()
    batch = Collator(PAD, "eval")(items(kind, (30, 24, 18, 27)))
    logits, seen = read_logits(model, batch), Seen(model)
    found, changed = read_candidates(model, batch)
    assert 0 < seen.tokens < batch["input_ids"].numel() / 2
    assert torch.allclose(losses(found, changed), losses(logits, batch), atol=1e-4)
    assert torch.equal(choose(found, changed), choose(logits, batch))


@torch.no_grad()
def test_short_prompts_are_read_whole() -> None:
    model, batch = ARCHITECTURES["llama"][0](), Collator(PAD, "eval")(items("choice", (3, 2, 4), most=6))
    found, same = read_candidates(model, batch)
    assert same is batch
    assert torch.equal(found, read_logits(model, batch))


@torch.no_grad()
def test_a_model_that_keeps_nothing_reads_all() -> None:
    model, batch = ARCHITECTURES["llama"][0](), Collator(PAD, "eval")(items("choice", (30, 24)))
    expected = read_logits(model, batch)
    model.register_forward_hook(lambda module, args, output: setattr(output, "past_key_values", None))
    found, same = read_candidates(model, batch)
    assert same is batch
    assert torch.equal(found, expected)


@pytest.mark.parametrize("learned", [PrefixTuningConfig, PromptTuningConfig])
@torch.no_grad()
def test_an_adapter_of_virtual_tokens_reads_all(learned: type[PeftConfig]) -> None:
    """Once wrong losses, or a traceback: PEFT puts these tokens before every call, the cache or not."""
    model = get_peft_model(ARCHITECTURES["llama"][0](), learned(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    batch = Collator(PAD, "eval")(items("choice", (30, 24)))
    found, same = read_candidates(model, batch)
    assert same is batch
    assert torch.equal(found, read_logits(model, batch))


@torch.no_grad()
def test_one_sequence_an_example_is_read_as_ever() -> None:
    model = ARCHITECTURES["llama"][0]()
    batch = Collator(PAD, "eval")([Item(0, tokens(9), [[3], [4]], 0, False, "classification")])
    found, same = read_candidates(model, batch)
    assert same is batch
    assert found.shape[1] == 1
