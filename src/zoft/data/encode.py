"""From a row to token ids."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

from zoft.errors import UserError

from .chat import earlier_replies, is_written, write
from .task import Kind, Row, Task, join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Item:
    """One example in token ids: a prompt, and what may follow it."""

    index: int
    """The example's row number in its data set."""
    prompt: list[int]
    candidates: list[list[int]]
    """The continuations to choose from; for generation, the one to learn."""
    gold: int
    """Index of the right candidate."""
    truncated: bool
    kind: Kind
    earlier: Sequence[tuple[int, int]] = ()
    """Where in the prompt earlier replies of a conversation begin and end, which are learned too."""

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest candidate."""
        return len(self.prompt) + max(map(len, self.candidates))


class Encoder:
    """Encodes the rows of a task for a tokenizer.

    Prompt and candidate together are the tokens of their joined text, after the beginning-of-sequence token of a
    tokenizer that adds one. `shots` are rows shown with their answers before the prompt. An answer to generate ends in
    the end-of-sequence token (without one, in the task's stop, a line break if it has none), so that the model learns
    to stop. Conversations are written by the tokenizer's chat template, with the tokens that it begins and ends texts
    with; of their earlier replies those are learned that it writes as if they were the last.

    A prompt with its longest candidate has at most `max_length` tokens (to generate takes `task.max_new_tokens`
    beyond the prompt, for which the caller leaves room): what is longer loses its shots, the first of them first,
    then the end of its passage, as a shot is worth less than the row's own text; a conversation loses its first turns,
    but for a system message; and an answer that is only read its end. Raises UserError where that is not enough, for
    conversations that the tokenizer has no chat template for, and for label words that it does not tell apart.

    task: the task, with the stop that its answers are learned to end in.
    words: the label words' ids, in the order of `task.words` (empty for other kinds).
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", task: Task, max_length: int, shots: Sequence[Row] = ()
    ) -> None:
        eos = tokenizer.eos_token_id
        if eos is None and task.kind == "generation":
            task = replace(task, stop=task.stop or "\n")
        self.task = task
        self.max_length = max_length
        self._tokenizer = tokenizer
        bos = tokenizer.bos_token_id
        self._start = [bos] if bos is not None and bos in tokenizer("").input_ids else []
        self._end: list[int] = []
        if task.kind in ("generation", "text"):
            self._end = [eos] if eos is not None else self._ids(task.stop or "\n")
        if any("turns" in row for row in shots):
            raise UserError("conversations are no shots: what is to stand before one belongs into its messages")
        self._shots = [self._shown(row) + "\n\n" for row in shots]
        # The template stands for every prompt: a word's tokens depend on no more than the prompt's last character.
        self.words = self._split(task.prompt, list(task.words.values()))[1] if task.words else []
        if len(set(map(tuple, self.words))) < len(self.words):
            raise UserError(f"the tokenizer does not tell apart the words {', '.join(task.words.values())}")

    def __call__(self, row: Row, index: int = 0) -> Item:
        """The example of a row, as `Task.read` gave it."""
        try:
            for number, (less, context) in enumerate(self._shortened(row)):
                item = self._item(less, index, context, truncated=number > 0)
                if item.length <= self.max_length:
                    break
            else:
                item = self._cut(less, index)
            return replace(item, earlier=self._earlier(less))
        except UserError as error:
            raise UserError(f"the row {self._shown(row)[:60]!r}: {error}") from error

    def _shortened(self, row: Row) -> Iterator[tuple[Row, str]]:
        """The row and what is shown before it, less and less of it; or less and less of a conversation's turns."""
        if "turns" not in row:
            yield from ((row, "".join(self._shots[first:])) for first in range(len(self._shots) + 1))
            return
        turns = row["turns"]
        system = [turn for turn in turns[:1] if turn["role"] == "system"]
        users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
        yield row, ""
        yield from (({**row, "turns": system + turns[i:]}, "") for i in users if i > len(system))

    def _cut(self, row: Row, index: int) -> Item:
        """The example with as much of its passage as there is room for, or of an answer that is only read."""
        if self.task.kind == "text":
            whole = self._item(row, index, "", truncated=True)
            if (left := self.max_length - len(whole.prompt)) > 0:
                return replace(whole, candidates=[whole.candidates[0][:left]])
        column = self.task.passage
        text = row[column] if column else ""

        def item(kept: int) -> Item:
            return self._item({**row, column: text[:kept]} if column else row, index, "", truncated=True)

        kept = bisect_right(range(len(text)), self.max_length, key=lambda kept: item(kept).length) - 1
        if kept < 0:
            what = f"even without its {column}" if column else "none of which may be cut"
            raise UserError(
                f"prompt and answer have {item(0).length} tokens, {what}, but only {self.max_length} "
                "fit; raise --max-length or leave the row out"
            )
        return item(kept)

    def _item(self, row: Row, index: int, context: str, truncated: bool) -> Item:
        if "turns" in row:
            prompt, candidates = self._conversation(row)
        else:
            text = context + self.task.show(row)
            if self.words:
                prompt, candidates = self._ids(text), self.words
            else:
                prompt, candidates = self._split(text, self.task.choices(row))
            prompt = self._start + prompt
        if not prompt and self.task.kind == "text":  # what nothing stands before cannot be predicted
            prompt, candidates = candidates[0][:1], [candidates[0][1:]]
        if not prompt:
            raise UserError("the prompt is empty")
        return Item(index, prompt, candidates, self.task.golds(row)[0], truncated, self.task.kind)

    def _split(self, prompt: str, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """The tokens of the joined texts, split where they and the prompt's own tokens part."""
        return self._part(prompt, [self._ids(join(prompt, answer)) + self._end for answer in answers])

    def _part(self, prompt: str, texts: Sequence[list[int]]) -> tuple[list[int], list[list[int]]]:
        columns = zip(self._ids(prompt), *texts, strict=False)
        shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
        return texts[0][:shared], [text[shared:] for text in texts]

    def _conversation(self, row: Row) -> tuple[list[int], list[list[int]]]:
        """The tokens of the turns and of the reply."""
        turns, reply, writing = row["turns"], row["reply"], row["writing"]
        prompt = write(self._tokenizer, turns, writing, reply_next=True)
        if reply is None:
            return self._ids(prompt), [self._end]
        text = write(self._tokenizer, [*turns, reply], writing)
        if not is_written(self._tokenizer, [*turns, reply], writing, text):
            raise UserError(f"the chat template writes no {'tool_calls' if reply.get('tool_calls') else 'reply'}")
        ids = self._ids(text)
        ended = ids[-1] in self._tokenizer.added_tokens_decoder  # by the template
        return self._part(prompt, [ids if ended else ids + self._end])

    def _earlier(self, row: Row) -> list[tuple[int, int]]:
        """Where in the tokens of a conversation's turns the replies are that are learned too."""
        if row.get("reply") is None:
            return []
        text, parts = earlier_replies(self._tokenizer, row)
        if not parts:
            return []
        if not self._tokenizer.is_fast:  # it does not tell which characters a token has
            return [(len(self._ids(text[:start])), len(self._ids(text[:end]))) for start, end in parts]
        tokens = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts, ends = zip(*tokens.offset_mapping, strict=True)
        return [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in parts]

    def _shown(self, row: Row) -> str:
        return join(self.task.show(row), self.task.choices(row)[self.task.golds(row)[0]])

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
