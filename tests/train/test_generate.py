"""Answers drawn from a model: they are drawn as it gives them, end where they end, and disturb no one else's draws."""

import dataclasses

import pytest
import torch
from torch import Tensor

from zoft.data import custom_task
from zoft.train.generate import as_texts, end_tokens, generate, lengths, random_as

from .tiny import TOKENIZER, make_model, make_tokenizer

TASK = dataclasses.replace(custom_task(), max_new_tokens=6)


def prompts(count: int) -> dict[str, Tensor]:
    ids = torch.tensor([TOKENIZER("fine film").input_ids] * count)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_the_first_token_is_drawn_as_likely_as_it_is() -> None:
    """Whatever the model's own settings for generating are."""
    model = make_model()
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=2, top_p=0.5, repetition_penalty=3.0)
    task = dataclasses.replace(TASK, max_new_tokens=1)
    with torch.no_grad(), random_as(0, torch.device("cpu")):
        expected = model(**prompts(1)).logits[0, -1].softmax(0)
        tokens = generate(model, TOKENIZER, task, prompts(4), samples=2500)
    assert tokens.shape == (10000, 1)
    found = torch.bincount(tokens[:, 0], minlength=len(expected)) / len(tokens)
    assert (found - expected).abs().max() < 4 * (expected.max() / len(tokens)) ** 0.5


def test_the_same_seed_draws_the_same_and_the_users_own_draws_go_on() -> None:
    model, found = make_model(), []
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for seed in (1, 1, 2):
        with random_as(seed, torch.device("cpu")):
            found.append(generate(model, TOKENIZER, TASK, prompts(2), samples=3))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(KeyError), random_as(1, torch.device("cpu")):
        raise KeyError
    assert found[0].shape == (6, found[0].shape[1])


def test_the_likeliest_tokens_whatever_the_models_own_settings_are() -> None:
    """Once beams, penalties and the kind of cache were taken from the model."""
    model = make_model()
    expected = generate(model, TOKENIZER, TASK, prompts(1))
    assert len(set(expected[0].tolist())) < 6, "there is a repetition to be penalised"
    model.generation_config.update(num_beams=3, repetition_penalty=5.0, no_repeat_ngram_size=1, min_length=2)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(generate(model, TOKENIZER, TASK, prompts(1)), expected)


def test_no_more_is_generated_than_the_model_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_model(), prompts(2)
    monkeypatch.setattr(model.config, "max_position_embeddings", 9)
    task = dataclasses.replace(TASK, max_new_tokens=99)
    tokens = generate(model, TOKENIZER, task, inputs)
    assert tokens.shape[1] == 9 - inputs["input_ids"].shape[1]


def test_a_reply_ends_as_the_chat_template_ends_it() -> None:
    """Once only at the end of sequence, which such a template does not write: answers went on after their end."""
    model, tokenizer = make_model(), make_tokenizer()
    [a, b] = tokenizer("film great").input_ids[:2]
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(b)]})  # as <|im_end|>
    end = tokenizer.convert_ids_to_tokens(b)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "\n{% endfor %}"
    assert b in (end_tokens(model, tokenizer) or ())
    assert lengths(model, tokenizer, TASK, torch.tensor([[a, b, a], [a, a, a]])) == [2, 3]
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    assert end_tokens(model, tokenizer) == end_tokens(model, TOKENIZER)


def test_where_answers_end() -> None:
    model = make_model()
    ends = end_tokens(model, TOKENIZER)
    assert ends is not None
    end, a, b = ends[0], *TOKENIZER("film great").input_ids[:2]
    answers = torch.tensor([[a, end, end, end], [a, b, a, b], [end, a, a, a]])
    assert lengths(model, TOKENIZER, TASK, answers) == [2, 4, 1]
    stop = TOKENIZER.decode([b]).strip()
    assert lengths(model, TOKENIZER, dataclasses.replace(TASK, stop=stop), answers) == [2, 2, 1]
    assert as_texts(TOKENIZER, answers[:1]) == as_texts(TOKENIZER, torch.tensor([[a, -100]]).numpy())
