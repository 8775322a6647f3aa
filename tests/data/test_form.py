"""The user's rows: prompts and answers, conversations, texts."""

import copy
import json
import math
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from zoft.data import IGNORE, Collator, Encoder, Item, custom_task, form_of, score
from zoft.errors import UserError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what drinks the cat?"}]
REPLY = {"role": "assistant", "content": "green tea"}


@pytest.fixture
def chat(bos_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(bos_tokenizer)
    tokenizer.chat_template = CHATML
    return tokenizer


def encoded(tokenizer: PreTrainedTokenizerFast, raw: dict[str, Any], length: int = 999, **options: Any) -> Item:
    task = custom_task(form=form_of(raw), **options)
    return Encoder(tokenizer, task, max_length=length)(task.read(raw))


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "a", "completion": "b", "text": "c"}, "answer"),
        ({"question": "a"}, "answer"),
        ({"messages": TURNS}, "conversation"),
        ({"prompt": TURNS, "completion": [REPLY]}, "conversation"),
        ({"conversations": TURNS}, "conversation"),
        ({"instruction": "a", "output": "b"}, "conversation"),
        ({"instruction": "a", "output": "b", "prompt": "c"}, "answer"),
        ({"instruction": "a", "context": "", "response": "b"}, "answer"),
        ({"text": "a", "source": "b"}, "text"),
        ({"text": "a", "messages": "three"}, "text"),
    ],
)
def test_form(row: dict[str, Any], form: str) -> None:
    assert form_of(row) == form


SHAREGPT = [
    {"from": name, "value": message["content"]}
    for name, message in zip(("system", "human", "gpt"), [*TURNS, REPLY], strict=True)
]


@pytest.mark.parametrize(
    "raw",
    [
        {"messages": [*TURNS, REPLY]},
        {"prompt": TURNS, "completion": [REPLY]},
        {"conversations": SHAREGPT},
        {"conversations": [*TURNS, REPLY]},
    ],
    ids=lambda raw: next(iter(raw)),
)
def test_the_last_reply_of_a_conversation_is_learned(chat: PreTrainedTokenizerFast, raw: dict[str, Any]) -> None:
    """Written by the chat template, which has the only beginning and end."""
    item = encoded(chat, raw)
    whole = chat.apply_chat_template([*TURNS, REPLY], tokenize=False).rstrip()
    assert item.prompt + item.candidates[0] == chat(whole, add_special_tokens=False).input_ids
    assert chat.decode(item.prompt).endswith("<|assistant|>")
    assert chat.decode(item.candidates[0]) == "green tea<eos>"
    assert item.prompt.count(chat.bos_token_id) == 1 and item.kind == "text"


THOUGHT = "{% if loop.last and m.role == 'assistant' %}<think>{% endif %}{{ m.content }}"


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}, {"input": "tea"}])
def test_an_instruction_and_its_output_are_a_conversation(chat: PreTrainedTokenizerFast, given: dict[str, Any]) -> None:
    item = encoded(chat, {"instruction": "what drinks the cat?", "output": "green tea", **given})
    asked = "what drinks the cat?" + "\n\ntea" * (given.get("input") == "tea")
    assert item == encoded(chat, {"messages": [{"role": "user", "content": asked}, REPLY]})


EARLIER = [TURNS[1], {"role": "assistant", "content": "red wine"}, TURNS[1] | {"content": "and the dog?"}]


def learned(tokenizer: Any, item: Item) -> list[str]:
    """What the batch that is trained on has as labels, stretch by stretch."""
    (labels,) = Collator(0, "train")([item])["labels"].tolist()
    stretches = groupby(labels, key=lambda label: label != IGNORE)
    return [tokenizer.decode(list(tokens)) for is_learned, tokens in stretches if is_learned]


def test_all_replies_of_a_conversation_are_learned(chat: PreTrainedTokenizerFast) -> None:
    """But those that a prompt shows."""
    item = encoded(chat, {"messages": [TURNS[0], *EARLIER, REPLY]})
    assert learned(chat, item) == ["red wine<eos>", "green tea<eos>"]
    assert learned(chat, encoded(chat, {"prompt": EARLIER, "completion": [REPLY]})) == ["green tea<eos>"]
    further = {"prompt": EARLIER, "completion": [REPLY, *EARLIER, REPLY]}
    assert learned(chat, encoded(chat, further)) == ["green tea<eos>", "red wine<eos>", "green tea<eos>"]
    for_answers = encoded(chat, {"messages": [TURNS[0], *EARLIER, REPLY]}, metric="f1")
    assert for_answers == replace(item, kind="generation")


def test_replies_are_found_among_the_tokens_of_any_tokenizer() -> None:
    """Also by one that does not say which characters its tokens have."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML.replace("{{ bos_token }}", "")
    item = encoded(tokenizer, {"messages": [*EARLIER, REPLY]})
    assert learned(tokenizer, item) == ["red wine</s>", "green tea</s>"]


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "pour", "arguments": {}}}]}
POUR = [{"type": "function", "function": {"name": "pour", "description": "tea", "parameters": {}}}]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("tools", [POUR, json.dumps(POUR)], ids=["list", "json"])
def test_tools_and_their_calls_are_written_by_the_template(
    chat: PreTrainedTokenizerFast, content: dict[str, Any], tools: Any
) -> None:
    """And calls are learned, those before the reply too."""
    says = (
        "{% if m.tool_calls %}{{ how or 'do' }} {{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}"
    )
    offers = "{% for t in tools or [] %}{{ t.function.description }} {% endfor %}"
    chat.chat_template = offers + CHATML.replace("{{ m.content }}", says)
    call = CALL | content
    raw = {"messages": [TURNS[1], call], "tools": tools, "chat_template_kwargs": {"how": "please"}}
    item = encoded(chat, raw)
    assert chat.decode(item.prompt).startswith("tea <bos><|user|>") and learned(chat, item) == ["please pour<eos>"]
    raw["messages"] = [TURNS[1], call, {"role": "tool", "content": "done"}, REPLY]
    assert learned(chat, encoded(chat, raw)) == ["please pour<eos>", "green tea<eos>"]
    assert learned(chat, encoded(chat, {"messages": raw["messages"]})) == ["do pour<eos>", "green tea<eos>"]
    row = custom_task(form="conversation").read({"messages": [TURNS[1], call]})
    assert json.loads(row["answers"][0]) == CALL["tool_calls"]


@pytest.mark.parametrize("content", ["", "one moment"])
def test_calls_that_the_template_does_not_write_are_not_learned(chat: PreTrainedTokenizerFast, content: str) -> None:
    """As nothing but the end would be, and the reply's are asked for."""
    messages = [TURNS[1], CALL | {"content": content}]
    with pytest.raises(UserError, match=r"row .*: the chat template writes no tool_calls"):
        encoded(chat, {"messages": messages})
    further = [*messages, {"role": "tool", "content": "done"}, REPLY]
    assert learned(chat, encoded(chat, {"messages": further})) == ["green tea<eos>"]


def test_a_reply_that_is_written_otherwise_later_is_not_learned(chat: PreTrainedTokenizerFast) -> None:
    """Templates of reasoning models write the last reply with its thought, and the earlier ones without."""
    chat.chat_template = CHATML.replace("{{ m.content }}", THOUGHT)
    assert learned(chat, encoded(chat, {"messages": [*EARLIER, REPLY]})) == ["<think>green tea<eos>"]


def test_a_greeting_before_all_prompts_is_not_learned(chat: PreTrainedTokenizerFast) -> None:
    item = encoded(chat, {"messages": [EARLIER[1], *TURNS[1:], REPLY]})
    assert learned(chat, item) == ["green tea<eos>"]


def test_turns_may_be_empty(chat: PreTrainedTokenizerFast) -> None:
    item = encoded(chat, {"messages": [{"role": "system", "content": ""}, TURNS[1], REPLY]})
    assert chat.decode(item.prompt).startswith("<bos><|system|><eos>\n<|user|>what")


def test_a_template_without_an_end_has_the_tokenizers(chat: PreTrainedTokenizerFast) -> None:
    chat.chat_template = CHATML.replace("{{ eos_token }}", "")
    assert chat.decode(encoded(chat, {"messages": [*TURNS, REPLY]}).candidates[0]) == "green tea<eos>"


def test_a_prompt_that_the_reply_replaces_is_not_learned(chat: PreTrainedTokenizerFast) -> None:
    """Templates of reasoning models open a thought, which a reply without one does not have."""
    chat.chat_template = CHATML.replace("<|assistant|>", "<|assistant|><think>")
    item = encoded(chat, {"messages": [*TURNS, REPLY]})
    assert chat.decode(item.prompt).endswith("<|assistant|>") and chat.decode(item.candidates[0]) == "green tea<eos>"


@pytest.mark.parametrize("reply", [[], [REPLY | {"content": ""}], [REPLY | {"content": None}]])
def test_a_conversation_to_be_answered_may_lack_its_reply(chat: PreTrainedTokenizerFast, reply: list[Any]) -> None:
    item = encoded(chat, {"messages": [*TURNS, *reply]}, answered=False, metric="rewards.py:f")
    assert chat.decode(item.prompt).endswith("<|assistant|>") and item.candidates == [[chat.eos_token_id]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (TURNS, "does not end with a message of the assistant"),
        ([], "does not end with a message of the assistant"),
        ([*TURNS, {"role": "assistant"}], "is no message of the form"),
        (["hello"], "'hello' is no message of the form"),
        ([*TURNS, REPLY | {"content": [{"type": "image"}]}], "an answer is empty or no text"),
        ([*TURNS, REPLY | {"content": ""}], "an answer is empty or no text"),
        ([*TURNS, REPLY | {"content": None}], "an answer is empty or no text"),
        ([*TURNS, REPLY | {"content": None, "tool_calls": []}], "an answer is empty or no text"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        custom_task(form="conversation").read({"messages": messages})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "[{"}, "column 'tools': broken JSON: Expecting property name"),
        ({"chat_template_kwargs": "no"}, "column 'chat_template_kwargs' holds str, not an object"),
    ],
)
def test_what_is_nothing_for_the_template_is_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        custom_task(form="conversation").read({"messages": [*TURNS, REPLY], **columns})


def test_what_the_template_refuses_is_said(chat: PreTrainedTokenizerFast) -> None:
    chat.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(UserError, match=r"row .*: the chat template refuses this conversation: no system message"):
        encoded(chat, {"messages": [*TURNS, REPLY]})
    chat.chat_template = CHATML.replace("{{ m.content }}{{ eos_token }}\n", "").replace("<|{{ m.role }}|>", "")
    with pytest.raises(UserError, match=r"row .*: the chat template writes no reply"):
        encoded(chat, {"messages": [*TURNS, REPLY]})
    chat.chat_template = None
    with pytest.raises(UserError, match="the model has no chat template"):
        encoded(chat, {"messages": [*TURNS, REPLY]})


def test_conversations_are_no_shots(chat: PreTrainedTokenizerFast) -> None:
    task = custom_task(form="conversation")
    with pytest.raises(UserError, match="no shots"):
        Encoder(chat, task, max_length=99, shots=[task.read({"messages": [*TURNS, REPLY]})])


def test_a_text_is_learned_from_its_beginning(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Without a token that stands for the beginning, from its second token."""
    text = "the cat drinks green tea"
    with_start, without = encoded(bos_tokenizer, {"text": text}), encoded(tokenizer, {"text": text})
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert (with_start.prompt, with_start.candidates) == ([bos_tokenizer.bos_token_id], [ids])
    assert (without.prompt, without.candidates) == (ids[:1], [ids[1:]])


def test_a_long_conversation_loses_its_first_turns(chat: PreTrainedTokenizerFast) -> None:
    """But not the system message, and what remains begins with the user."""
    turns = [{"role": role, "content": f"{role} {i} " * 9} for i in range(3) for role in ("user", "assistant")]
    whole, last = (encoded(chat, {"messages": [TURNS[0], *some, *TURNS[1:], REPLY]}) for some in (turns, turns[4:]))
    item = encoded(chat, {"messages": [TURNS[0], *turns, *TURNS[1:], REPLY]}, last.length + 5)
    assert item.length < whole.length and item == replace(last, truncated=True)
    alone = encoded(chat, {"messages": [TURNS[1], REPLY]})
    assert encoded(chat, {"messages": [*turns, TURNS[1], REPLY]}, alone.length) == replace(alone, truncated=True)


def test_what_is_only_read_is_cut_at_its_end(chat: PreTrainedTokenizerFast) -> None:
    """And a conversation whose turns alone are too long is refused."""
    raw = {"messages": [*TURNS, REPLY]}
    whole = encoded(chat, raw)
    cut = encoded(chat, raw, len(whole.prompt) + 1)
    assert cut.truncated and (cut.prompt, cut.candidates) == (whole.prompt, [whole.candidates[0][:1]])
    with pytest.raises(UserError, match="none of which may be cut, but only 20 fit"):
        encoded(chat, raw, 20)


@pytest.mark.parametrize(
    ("form", "metric", "found"),
    [
        ("conversation", None, ("text", "likelihood")),
        ("conversation", "f1", ("generation", "f1")),
        ("text", None, ("text", "likelihood")),
        ("answer", "likelihood", ("text", "likelihood")),
        ("answer", None, ("generation", "exact_match")),
    ],
)
def test_metrics(form: Any, metric: str | None, found: tuple[str, str]) -> None:
    task = custom_task(form=form, metric=metric)
    assert (task.kind, task.metric) == found and (task.max_new_tokens != 0) == (task.kind == "generation")


def test_a_text_is_not_generated() -> None:
    with pytest.raises(UserError, match="metric 'f1' does not fit this task; choose from likelihood"):
        custom_task(form="text", metric="f1")


def test_a_named_template_takes_the_columns_as_they_are() -> None:
    assert custom_task("{text} It was", {"0": "bad", "1": "good"}, form="text").kind == "classification"
    assert custom_task("{text}", label="reply", form="text").read({"text": "a", "reply": "b"})["answers"] == ["b"]


def test_likelihood() -> None:
    task = custom_task(form="text")
    rows = [task.read({"text": text}) for text in ("a", "b")]
    assert score(task, [math.log(2), math.log(8)], rows) == {"likelihood": pytest.approx(1 / 4)}


def test_a_text_is_evaluated_as_it_is_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    items = [encoded(tokenizer, {"text": text}) for text in ("the cat", "the cat drinks green tea")]
    train, evaluation = (Collator(0, mode)(items) for mode in ("train", "eval"))
    assert all(train[name].equal(evaluation[name]) for name in train.keys() | evaluation.keys())
