"""Conversations as a tokenizer's chat template writes them."""

from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from zoft.errors import UserError

from .task import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Row], writing: Mapping[str, Any], reply_next: bool = False
) -> str:
    """The messages in text; with `reply_next`, up to where the assistant's next one begins.

    `writing` is given to the template too.

    Raises UserError if there is no chat template or it refuses these messages.
    """
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template: choose one that has, or give prompt and completion as text")
    try:
        text = str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=reply_next, **writing)
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template refuses this conversation: {error}") from error
    return text if reply_next else text.rstrip()


def reply_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that the chat template ends a reply with, if it does and has one: ChatML's <|im_end|>."""
    if not tokenizer.chat_template:
        return None
    try:
        text = write(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], {})
    except UserError:  # for want of something that the template asks for
        return None
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ids[-1] if ids and ids[-1] in tokenizer.added_tokens_decoder else None


def is_written(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Row], writing: Mapping[str, Any], text: str
) -> bool:
    """Whether `text`, which the template makes of `messages`, has what the last one says (its calls, if it has any)."""
    *turns, last = messages
    less = {"role": last["role"], "content": (last.get("content") or "") if last.get("tool_calls") else ""}
    return text != write(tokenizer, [*turns, less], writing)


def earlier_replies(tokenizer: "PreTrainedTokenizerBase", row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation's turns, and where in it replies that are learned too begin and end ("" if none may).

    These are the assistant's messages among the last `learned` turns (`zoft.data.form.conversation`), but not those
    that the template does not write, or otherwise once they are not the last (without their thought).
    """
    turns, writing = row["turns"], row["writing"]
    first = max(1, len(turns) - row["learned"])
    replies = [i for i in range(first, len(turns)) if turns[i]["role"] == "assistant"]
    prompt = write(tokenizer, turns, writing, reply_next=True) if replies else ""
    found = []
    for i in replies:
        after = write(tokenizer, turns[: i + 1], writing)
        if prompt.startswith(after) and is_written(tokenizer, turns[: i + 1], writing, after):
            opened = write(tokenizer, turns[:i], writing, reply_next=True)
            found.append((len(commonprefix([opened, prompt])), len(after)))  # noqa: RUF071 - of characters
    return prompt, found
