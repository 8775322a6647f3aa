"""The forms that the user's rows may have: those that TRL's SFTTrainer takes, and ShareGPT's."""

from collections.abc import Mapping
from typing import Any, Literal

from zoft.errors import UserError

from .task import Row

Form = Literal["answer", "conversation", "text"]

SHAREGPT = {"human": "user", "gpt": "assistant"}


def form_of(row: Mapping[str, Any]) -> Form:
    """What a row is, by its columns: a prompt and its answer, a conversation, or text.

    A conversation has ``messages``, or messages in ``prompt`` and ``completion``, or ShareGPT's ``conversations``; text
    has ``text`` and none of these.
    """
    if any(isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt")):
        return "conversation"
    return "text" if "text" in row and not {"prompt", "completion"} & row.keys() else "answer"


def conversation(row: Row, answered: bool) -> Row:
    """The columns of a conversation: `turns`, all messages before the `reply`, which is the assistant's last.

    The text of the reply is the answer, and the turns are shown as the prompt. The last `learned` of the turns are part
    of what is learned: the assistant's messages among them, beside the reply. Unless `answered`, the reply may be
    missing (None). Raises UserError for what is no message, and for a conversation without its reply.
    """
    given = 0  # messages that are only read
    if "messages" in row:
        messages = row["messages"]
    elif "conversations" in row:
        messages = [{"role": SHAREGPT.get(m["from"], m["from"]), "content": m["value"]} for m in row["conversations"]]
    else:
        messages, given = [*row["prompt"], *row.get("completion", [])], len(row["prompt"])
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
            raise UserError(f'{message!r:.60} is no message of the form {{"role": "user", "content": "..."}}')
    replied = bool(messages) and messages[-1]["role"] == "assistant"
    if answered and not replied:
        raise UserError("the conversation does not end with a message of the assistant, which is what is learned")
    turns, reply = (messages[:-1], messages[-1]) if replied else (messages, None)
    shown = "\n".join(f"{message['role']}: {message['content']}" for message in turns)
    learned = max(0, len(turns) - given)
    answers = [reply["content"] if reply else ""]
    return {"prompt": shown, "turns": turns, "reply": reply, "learned": learned, "answers": answers}


def text(row: Row) -> Row:
    """The columns of a text that is learned from its beginning."""
    return {"prompt": "", "answers": [row["text"]]}
