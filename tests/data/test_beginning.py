"""Prompts that begin alike read once, against every sequence read whole."""

from typing import Any

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_candidates import PAD, Seen, tokens
from torch import Tensor

from optim.models import ARCHITECTURES, llama
from zoft.data import Collator, Item, begin, choose, losses, positions_to_keep, read_logits
from zoft.data.beginning import shared_length

START = tokens(24)


def items(kind: str, own: tuple[int, ...], start: list[int] = START) -> list[Item]:
    """Examples that begin alike and go on for so many tokens, with candidates of one token or of some."""
    words = [[5], [6]]
    candidates = {"classification": [words] * len(own), "generation": [[tokens(3)]] * len(own)}
    candidates["choice"] = [[tokens(1 + n) for n in range(2 + index % 3)] for index in range(len(own))]
    return [
        Item(index, start + tokens(length), candidates[kind][index], 0, False, kind) for index, length in enumerate(own)
    ]


WHOLE = [name for name in ARCHITECTURES if name != "gemma3"]  # whose layers see a window of tokens


@pytest.mark.parametrize("kind", ["choice", "classification", "generation"])
@pytest.mark.parametrize("architecture", WHOLE)
@torch.no_grad()
def test_the_same_logits_with_fewer_tokens(architecture: str, kind: str) -> None:
    model = ARCHITECTURES[architecture][0]()
    batch = Collator(PAD, "eval")(items(kind, (3, 9, 1, 6)))
    expected, seen = read_logits(model, batch), Seen(model)
    begun = begin(model, batch)
    assert begun is not None and begun.length >= len(START)
    found = begun.logits(model, positions_to_keep(batch))
    assert seen.tokens <= batch["input_ids"].numel() / 2
    assert torch.allclose(losses(found, batch), losses(expected, batch), atol=1e-4)
    if kind != "generation":
        assert torch.equal(choose(found, batch), choose(expected, batch))


@pytest.mark.parametrize("architecture", WHOLE)
@torch.no_grad()
def test_the_same_text(architecture: str) -> None:
    model = ARCHITECTURES[architecture][0]()
    batch = Collator(PAD, "generate")(items("generation", (3, 9, 1, 6)))
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}

    def text(inputs: dict[str, Tensor], **more: Any) -> Tensor:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return model.generate(**given, **settings, **more)[:, inputs["input_ids"].shape[1] :]

    begun = begin(model, batch)
    assert begun is not None
    assert torch.equal(text(begun.inputs, past_key_values=begun.cache), text(batch))


def test_something_is_left_of_each_prompt() -> None:
    """The token that predicts the answer, even where one prompt is the beginning of all others."""
    batch = Collator(PAD, "eval")(items("generation", (0, 5, 3)))
    assert shared_length(batch) == len(START) - 1
    assert shared_length(Collator(PAD, "eval")(items("choice", (0, 5), start=[4]))) == 0


@pytest.mark.parametrize("start", [[], START[:4]])
def test_what_is_not_worth_it_is_read_whole(start: list[int]) -> None:
    assert begin(llama(), Collator(PAD, "eval")(items("classification", (9, 8, 12), start))) is None


@torch.no_grad()
def test_a_model_that_does_not_keep_all_reads_all() -> None:
    model, batch = llama(), Collator(PAD, "eval")(items("classification", (3, 4, 2)))
    assert begin(model, batch) is not None
    model.register_forward_hook(lambda module, args, output: setattr(output, "past_key_values", None))
    assert begin(model, batch) is None
    assert begin(ARCHITECTURES["gemma3"][0](), batch) is None


@pytest.mark.parametrize("learned", [PrefixTuningConfig, PromptTuningConfig])
@torch.no_grad()
def test_an_adapter_of_virtual_tokens_reads_all(learned: type[PeftConfig]) -> None:
    model = get_peft_model(llama(), learned(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    assert begin(model, Collator(PAD, "eval")(items("classification", (3, 4, 2)))) is None
