"""The forms that the user's rows may have: those that TRL's SFTTrainer takes, ShareGPT's and Alpaca's."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from zoft.errors import UserError

from .task import Row

Form = Literal["answer", "conversation", "text"]

SHAREGPT = {"human": "user", "gpt": "assistant"}
ALPACA = {"instruction", "output"}  # and perhaps an "input"


def form_of(row: Mapping[str, Any]) -> Form:
    """What a row is, by its columns: a prompt and its answer, a conversation, or text.

    A conversation has ``messages``, or messages in ``prompt`` and ``completion``, or ShareGPT's ``conversations``, or
    Alpaca's ``instruction`` and ``output``; text has ``text`` and none of these.
    """
    if any(isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt")):
        return "conversation"
    if row.keys() >= ALPACA and not {"prompt", "completion"} & row.keys():
        return "conversation"
    return "text" if "text" in row and not {"prompt", "completion"} & row.keys() else "answer"


def conversation(row: Row, answered: bool) -> Row:
    """The columns of a conversation: `turns`, all messages before the `reply`, which is the assistant's last.

    The text of the reply is the answer, or if it has none the tools that it calls, and the turns are shown as the
    prompt. The last `learned` of the turns are part of what is learned: the assistant's messages among them, beside the
    reply. Unless `answered`, the reply may be missing or empty (None). `writing` is what else the chat template is
    given: the columns ``tools``, a list or JSON, and ``chat_template_kwargs``, as TRL has them.

    Raises UserError for what is no message, and for a conversation without its reply.
    """
    given = 0  # messages that are only read
    if "messages" in row:
        messages = row["messages"]
    elif "conversations" in row:
        messages = [_message(one) for one in row["conversations"]]
    elif "instruction" in row and "prompt" not in row:
        asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    else:
        messages, given = [*row["prompt"], *row.get("completion", [])], len(row["prompt"])
    for message in messages:
        from_someone = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not (from_someone and ("content" in message or message.get("tool_calls"))):
            raise UserError(f'{message!r:.60} is no message of the form {{"role": "user", "content": "..."}}')
    replied = bool(messages) and messages[-1]["role"] == "assistant"
    if answered and not replied:
        raise UserError("the conversation does not end with a message of the assistant, which is what is learned")
    turns, reply = (messages[:-1], messages[-1]) if replied else (messages, None)
    if reply and not answered and not _said(reply):
        reply = None
    return {
        "prompt": "\n".join(f"{message['role']}: {_said(message)}" for message in turns),
        "turns": turns,
        "reply": reply,
        "learned": max(0, len(turns) - given),
        "answers": [_said(reply) if reply else ""],
        "writing": _writing(row),
    }


def _message(one: Any) -> Any:
    """ShareGPT's message in the usual form, in which some of its data sets have it."""
    if not isinstance(one, dict) or "from" not in one:
        return one
    return {"role": SHAREGPT.get(one["from"], one["from"]), "content": one["value"]}


def _said(message: Row) -> Any:
    """Its content, or if it has none the tools that it calls."""
    calls = message.get("tool_calls")
    return json.dumps(calls) if calls and not message.get("content") else message["content"]


def _writing(row: Row) -> dict[str, Any]:
    tools, others = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"column 'tools': broken JSON: {error}") from error
    if not isinstance(others, dict):
        raise UserError(f"column 'chat_template_kwargs' holds {type(others).__name__}, not an object")
    return {"tools": tools} | others if tools else others


def text(row: Row) -> Row:
    """The columns of a text that is learned from its beginning."""
    return {"prompt": "", "answers": [row["text"]]}
