"""Tasks, rows, token ids, batches, losses and metrics: everything between a data file and a forward pass."""

from .beginning import Begun, begin
from .candidates import read_candidates
from .chat import reply_end
from .collate import IGNORE, Collator, divide
from .custom import UNKNOWN, custom_task, parse_words
from .dataset import TaskDataset
from .drawn import drawn
from .encode import Encoder, Item
from .form import form_of
from .metrics import GENERATED, LIKELIHOOD, score, score_each
from .objective import choose, examples, losses, positions_to_keep, read_logits, slope
from .reward import is_reward, load_reward
from .source import first_row, hold_out, load_rows, sample
from .task import Row, Task, load_task, task_names

__all__ = [
    "GENERATED",
    "IGNORE",
    "LIKELIHOOD",
    "UNKNOWN",
    "Begun",
    "Collator",
    "Encoder",
    "Item",
    "Row",
    "Task",
    "TaskDataset",
    "begin",
    "choose",
    "custom_task",
    "divide",
    "drawn",
    "examples",
    "first_row",
    "form_of",
    "hold_out",
    "is_reward",
    "load_reward",
    "load_rows",
    "load_task",
    "losses",
    "parse_words",
    "positions_to_keep",
    "read_candidates",
    "read_logits",
    "reply_end",
    "sample",
    "score",
    "score_each",
    "slope",
    "task_names",
]
