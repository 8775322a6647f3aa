from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from zoft.data import UNKNOWN, Encoder, Row, Task, TaskDataset, custom_task, load_task, score
from zoft.errors import UserError

SST2 = load_task("sst2")
DROP = load_task("drop")
PIQA = load_task("piqa")


def question(passage: str = "the cat sat on the mat.", answer: str = "on the mat") -> Row:
    return DROP.read({"passage": passage, "question": "where?", "answers": [answer]})


def review(text: str, label: int = 1) -> Row:
    return SST2.read({"sentence": text, "label": label})


def test_label_words(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, SST2, max_length=64)
    item = encoder(review("the cat"), index=7)
    assert [tokenizer.decode(word) for word in encoder.words] == [" terrible", " great"]
    assert tokenizer.decode(item.prompt) == "the cat It was"
    assert item.candidates == encoder.words
    assert (item.index, item.gold, item.truncated, item.length) == (7, 1, False, len(item.prompt) + 1)


def test_longer_label_words(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, replace(SST2, words={"0": "terrible", "1": "quite good"}), max_length=64)
    assert [tokenizer.decode(word) for word in encoder.words] == [" terrible", " quite good"]


def test_space_at_the_end_of_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    item = Encoder(tokenizer, replace(SST2, prompt="{sentence} It was "), max_length=64)(review("the cat"))
    assert item == Encoder(tokenizer, SST2, max_length=64)(review("the cat"))


def test_words_the_tokenizer_does_not_tell_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="does not tell apart the words great, great"):
        Encoder(tokenizer, replace(SST2, words={"0": "great", "1": "great"}), max_length=64)


def test_beginning_of_sequence(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Encoder(bos_tokenizer, SST2, max_length=64)(review("the cat")).prompt
    assert prompt == bos_tokenizer("the cat It was").input_ids
    assert prompt.count(bos_tokenizer.bos_token_id) == 1


def test_text_is_tokenised_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    item = Encoder(tokenizer, DROP, max_length=256)(question())
    text = "Passage: the cat sat on the mat.\nQuestion: where?\nAnswer: on the mat"
    assert item.prompt + item.candidates[0] == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(item.prompt).endswith("Answer:")


def test_stop_without_end_of_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    item = Encoder(without, DROP, max_length=256)(question())
    assert without.decode(item.candidates[0]) == " on the mat\n"
    own = custom_task()
    encoder = Encoder(without, own, max_length=256)
    assert encoder.task.stop == "\n" and Encoder(tokenizer, own, max_length=256).task.stop is None
    row = own.read({"prompt": "where?", "completion": "here"})
    assert without.decode(encoder(row).candidates[0]) == " here\n"
    assert score(encoder.task, ["here\nand on"], [row]) == {"exact_match": 1}, "once it was to have stopped by itself"


def test_choices_share_one_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    row = PIQA.read({"goal": "Sit.", "sol1": "on the mat", "sol2": "on the cat", "label": 1})
    item = Encoder(tokenizer, PIQA, max_length=256)(row)
    assert [tokenizer.decode(item.prompt + candidate) for candidate in item.candidates] == [
        "Question: Sit.\nAnswer: on the mat",
        "Question: Sit.\nAnswer: on the cat",
    ]
    assert item.gold == 1


@pytest.mark.parametrize("max_length", range(40, 80, 3))
def test_passage_is_cut_at_its_end(tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    passage = "the cat sat on the mat. " * 20
    item = Encoder(tokenizer, DROP, max_length)(question(passage))
    before, after = tokenizer.decode(item.prompt).split("\nQuestion: where?\nAnswer:")
    assert item.truncated and after == ""
    assert passage.startswith(before.removeprefix("Passage: "))
    assert tokenizer.decode(item.candidates[0]) == " on the mat<eos>"
    assert max_length - 1 <= item.length <= max_length, "no more is cut than must be"


def test_shots(tokenizer: PreTrainedTokenizerFast) -> None:
    shots = [review("the mat", 0), review("the cat", 1)]
    full = Encoder(tokenizer, SST2, max_length=64, shots=shots)(review("sat"))
    assert tokenizer.decode(full.prompt) == "the mat It was terrible\n\nthe cat It was great\n\nsat It was"
    assert not full.truncated
    short = Encoder(tokenizer, SST2, max_length=full.length - 1, shots=shots)(review("sat"))
    assert tokenizer.decode(short.prompt) == "the cat It was great\n\nsat It was"
    assert short.truncated


def test_too_long(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"row 'Passage: the cat .* tokens, even without its passage, but only 10 fit"):
        Encoder(tokenizer, DROP, max_length=10)(question(), index=3)
    task = custom_task()
    message = r"row 'what is it\? x{48}': .* none of which may be cut, but only 3 fit; raise --max-length"
    with pytest.raises(UserError, match=message):
        Encoder(tokenizer, task, max_length=3)(task.read({"prompt": "what is it? " + "x" * 99, "completion": "x"}))


def test_empty_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    task = custom_task()
    with pytest.raises(UserError, match="row 'x': the prompt is empty"):
        Encoder(tokenizer, task, max_length=9)(task.read({"prompt": "", "completion": "x"}))


def test_dataset(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [review("the cat"), review("the cat sat on the mat " * 9)]
    data = TaskDataset(rows, Encoder(tokenizer, SST2, max_length=16))
    assert len(data) == 2 and data.rows == rows
    assert [data[0].index, data[1].index] == [0, 1]
    assert data.lengths == [data[0].length, data[1].length] and max(data.lengths) <= 16
    assert data.truncated == 1 and data.learned == 2 / sum(data.lengths)
    assert data.task == SST2


def test_answers_may_be_twice_as_long_as_the_longest_of_the_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    """Once own rows were given 128 tokens: minutes for an untrained model to answer sums, too few for long answers."""

    def new_tokens(task: Task, *answers: str) -> int | None:
        rows = [task.read({"prompt": "what?", "completion": answer}) for answer in answers]
        return TaskDataset(rows, Encoder(tokenizer, task, max_length=999)).task.max_new_tokens

    task = custom_task()
    long = "the cat sat on the mat " * 40
    tokens = len(Encoder(tokenizer, task, max_length=999)(task.read({"prompt": "?", "completion": long})).candidates[0])
    assert tokens > 200 and new_tokens(task, "cat", long, "mat") == 2 * tokens
    assert new_tokens(task, "cat", "mat") == 32 == new_tokens(task)
    assert new_tokens(replace(task, max_new_tokens=7), long) == 7
    assert new_tokens(custom_task(metric="r.py:f"), long) == UNKNOWN


def test_any_task_can_be_a_shot(tokenizer: PreTrainedTokenizerFast) -> None:
    def context(task: Task, row: Row) -> str:
        prompt = tokenizer.decode(Encoder(tokenizer, task, max_length=999, shots=[row])(row).prompt)
        return prompt.split("\n\n")[0]

    assert context(DROP, question()).endswith("Answer: on the mat")
    piqa = PIQA.read({"goal": "Sit.", "sol1": "on the mat", "sol2": "on the cat", "label": 1})
    assert context(PIQA, piqa).endswith("Answer: on the cat")
