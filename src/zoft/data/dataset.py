"""The encoded examples of a split."""

from collections.abc import Sequence

from torch.utils.data import Dataset

from .encode import Encoder, Item
from .task import Row


class TaskDataset(Dataset[Item]):
    """Rows, encoded at construction: choose the rows first (`sample`), then make the data set.

    rows: the rows as given. lengths: tokens of each example, for batches of like length.
    truncated: how many examples had to be shortened. learned: the share of the tokens that are learned.
    """

    def __init__(self, rows: Sequence[Row], encoder: Encoder) -> None:
        self.rows = rows
        self._items = [encoder(row, index) for index, row in enumerate(rows)]
        self.lengths = [item.length for item in self._items]
        self.truncated = sum(item.truncated for item in self._items)
        answers = sum(len(item.candidates[item.gold]) for item in self._items)
        earlier = sum(end - start for item in self._items for start, end in item.earlier)
        self.learned = (answers + earlier) / max(1, answers + sum(len(item.prompt) for item in self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[index]
