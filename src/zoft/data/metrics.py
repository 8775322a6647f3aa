"""How good predictions are: each metric is the mean over examples, or one number for all, higher for better."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from .reward import is_reward, rewards
from .task import Row, Task

ARTICLES = ("a", "an", "the")
OPENING, CLOSING = "\"'([{“‘«¿¡", ".,;:!?\"')]}”’»…"  # around words


def accuracy(predictions: Sequence[int], golds: Sequence[Sequence[int]]) -> float:
    """The share of predicted indices that are among the right ones."""
    return fmean(prediction in right for prediction, right in zip(predictions, golds, strict=True))


def matthews(predictions: Sequence[int], golds: Sequence[Sequence[int]]) -> float:
    """The Matthews correlation of predicted and right class, of any number; 0 where it is undefined."""
    truths = [right[0] for right in golds]
    count = len(truths)
    predicted, actual = Counter(predictions), Counter(truths)
    hits = sum(guess == truth for guess, truth in zip(predictions, truths, strict=True))
    covariance = hits * count - sum(predicted[label] * actual[label] for label in actual)
    spread = math.prod(count**2 - sum(n**2 for n in marginal.values()) for marginal in (predicted, actual))
    return covariance / math.sqrt(spread) if spread else 0.0


def squad_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles: how SQuAD's published figures compare answers."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in text.split() if word not in ARTICLES]


def plain_words(text: str) -> list[str]:
    """Lower case, without marks around words, and articles; but if nothing else is there, that is the answer.

    What SQuAD's comparison loses, signs and decimal points and names such as C++, stays.
    """
    bare = (word.lstrip(OPENING).rstrip(CLOSING) for word in text.lower().split())
    words = [word for word in bare if word] or text.lower().split()
    return [word for word in words if word not in ARTICLES] or words


Words = Callable[[str], list[str]]


def f1(predictions: Sequence[str], answers: Sequence[Sequence[str]], words: Words = squad_words) -> float:
    """SQuAD's F1 of the `words` of prediction and answer, with the best of each example's accepted answers."""
    return _mean_of_best(lambda text, answer: _f1(words(text), words(answer)), predictions, answers)


def exact_match(predictions: Sequence[str], answers: Sequence[Sequence[str]], words: Words = squad_words) -> float:
    """The share of predictions that have the same `words` as an accepted answer."""
    return _mean_of_best(lambda text, answer: float(words(text) == words(answer)), predictions, answers)


def number_match(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """The share of predictions whose final number is that of an accepted answer.

    The final number follows "####", as in GSM8K, or else is the last one in the text.
    """
    return _mean_of_best(
        lambda text, answer: float(_number(text) is not None and _number(text) == _number(answer)),
        predictions,
        answers,
    )


def likelihood(losses: Sequence[float], golds: Sequence[Sequence[int]]) -> float:
    """The geometric mean of the probabilities of the answers' tokens, every example counting alike: ``exp(-loss)``."""
    return math.exp(-fmean(losses))


METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "f1": f1,
    "exact_match": exact_match,
    "number_match": number_match,
    "likelihood": likelihood,
}
GENERATED = ("exact_match", "f1", "number_match")  # of generated answers
LIKELIHOOD = "likelihood"  # of answers that are read


Predictions = Sequence[int] | Sequence[str] | Sequence[float]


def score(task: Task, predictions: Predictions, rows: Sequence[Row]) -> dict[str, float]:
    """The task's metrics, the main one first, of predicted indices, generated texts, or losses of texts for these rows.

    Generated text counts up to the task's stop.
    """
    pair = _found_and_right(task, predictions, rows)
    return {
        name: fmean(score_each(task, name, predictions, rows)) if is_reward(name) else _metric(task, name)(*pair)
        for name in (task.metric, *task.also)
    }


def score_each(task: Task, name: str, predictions: Predictions, rows: Sequence[Row]) -> list[float]:
    """The metric `name`, which is a mean over examples, of each of them."""
    found, right = _found_and_right(task, predictions, rows)
    if not is_reward(name):
        metric = _metric(task, name)
        return [metric([one], [its]) for one, its in zip(found, right, strict=True)]
    texts = found if task.kind == "generation" else [task.choices(row)[i] for i, row in zip(found, rows, strict=True)]
    return rewards(name, [task.show(row) for row in rows], texts, rows)


def _metric(task: Task, name: str) -> Callable[..., float]:
    own = task.hub is None and name in (f1.__name__, exact_match.__name__)
    return partial(METRICS[name], words=plain_words) if own else METRICS[name]


def _found_and_right(task: Task, predictions: Sequence, rows: Sequence[Row]) -> tuple[Sequence, Sequence]:
    """Texts and the accepted ones, or indices and the right ones."""
    if task.kind != "generation":
        return predictions, [task.golds(row) for row in rows]
    texts = [str(text).split(task.stop)[0] if task.stop else str(text) for text in predictions]
    return texts, [row["answers"] for row in rows]


def _mean_of_best(
    metric: Callable[[str, str], float], predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> float:
    pairs = zip(predictions, answers, strict=True)
    return fmean(max(metric(text, answer) for answer in accepted) for text, accepted in pairs)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def _number(text: str) -> float | None:
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.rpartition("####")[2].replace(",", ""))
    return float(numbers[-1]) if numbers else None
