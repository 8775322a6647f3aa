"""The encoded examples of a split."""

from collections.abc import Sequence
from dataclasses import replace

from torch.utils.data import Dataset

from .encode import Encoder, Item
from .task import Row

SHORT = 32  # tokens of a generated answer: enough for one that says more than it has to


class TaskDataset(Dataset[Item]):
    """Rows, encoded at construction: choose the rows first (`sample`), then make the data set.

    rows: the rows as given. lengths: tokens of each example, for batches of like length.
    task: the encoder's; where it leaves open how long a generated answer may be, twice as long as the longest of these.
    truncated: how many examples had to be shortened. learned: the share of the tokens that are learned.
    """

    def __init__(self, rows: Sequence[Row], encoder: Encoder) -> None:
        self.rows, self.task = rows, encoder.task
        self._items = [encoder(row, index) for index, row in enumerate(rows)]
        self.lengths = [item.length for item in self._items]
        self.truncated = sum(item.truncated for item in self._items)
        if self.task.max_new_tokens is None:
            longest = max((len(tokens) for item in self._items for tokens in item.candidates), default=0)
            self.task = replace(self.task, max_new_tokens=max(SHORT, 2 * longest))
        answers = sum(len(item.candidates[item.gold]) for item in self._items)
        earlier = sum(end - start for item in self._items for start, end in item.earlier)
        self.learned = (answers + earlier) / max(1, answers + sum(len(item.prompt) for item in self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[index]
