import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest

from zoft.data import custom_task, hold_out, load_rows, load_task, sample
from zoft.errors import UserError

SST2 = load_task("sst2")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"sentence": f"film {number}", "label": number % 2} for number in range(count)]


def test_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows_of(4))
    write(tmp_path / "test.jsonl", rows_of(2))
    assert load_rows(SST2, tmp_path, "train") == rows_of(4)
    assert load_rows(SST2, str(tmp_path), "validation") == rows_of(2), "the test file stands in"
    write(tmp_path / "validation.jsonl", rows_of(3))
    assert load_rows(SST2, tmp_path, "validation") == rows_of(3)


@pytest.mark.parametrize(("count", "held"), [(2, 1), (9, 1), (100, 10), (6000, 500)])
def test_single_file_holds_out_its_end(tmp_path: Path, count: int, held: int) -> None:
    file = write(tmp_path / "my.jsonl", rows_of(count))
    train, validation = (load_rows(SST2, file, split) for split in ("train", "validation"))
    assert len(validation) == held
    assert train + validation == rows_of(count)


def test_encodings_and_line_ends(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(
        b'\xef\xbb\xbf{"sentence": "caf\xc3\xa9\xe2\x80\xa8x", "label": 1}\r\n\r\n{"sentence": "b", "label": "0"}\r\n'
    )
    assert [row["sentence"] for row in load_rows(SST2, tmp_path, "train")] == ["café\u2028x", "b"]
    (tmp_path / "validation.csv").write_bytes(b'\xef\xbb\xbfsentence,label\r\n"a, ""b""\nc",1\r\n')
    assert load_rows(SST2, tmp_path, "validation") == [{"sentence": 'a, "b"\nc', "label": "1"}]


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    """Once no rows, as some systems name files so."""
    assert load_rows(SST2, write(tmp_path / "TRAIN.JSONL", rows_of(4)), "train") == rows_of(3)
    (tmp_path / "validation.CSV").write_text("sentence,label\nx,1\n")
    assert load_rows(SST2, tmp_path, "validation") == [{"sentence": "x", "label": "1"}]


def test_long_fields(tmp_path: Path) -> None:
    """Once more than Python's limit of 131072 characters was called broken."""
    (tmp_path / "train.csv").write_text(f"sentence,label\n{'long ' * 40_000},1\n")
    [row] = load_rows(SST2, tmp_path, "train")
    assert len(row["sentence"]) == 5 * 40_000 - 1


def test_unlabelled_rows_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", [*rows_of(3), {"sentence": "x", "label": -1}])
    assert load_rows(SST2, tmp_path, "train") == rows_of(3)
    write(file, [{"sentence": "x", "label": -1}])
    with pytest.raises(UserError, match="no labelled rows for train"):
        load_rows(SST2, tmp_path, "train")


def test_an_answer_may_be_minus_one(tmp_path: Path) -> None:
    """Once such rows were left out, as if they had no label."""
    rows = [{"prompt": f"{number} minus 3 is", "completion": str(number - 3)} for number in range(6)]
    found = load_rows(custom_task(), write(tmp_path / "my.jsonl", rows), "train")
    assert [row["answers"] for row in found] == [["-3"], ["-2"], ["-1"], ["0"], ["1"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: no labelled rows for train"),
        ("a.jsonl", b'{"sentence": "x", "label": 1}', "one row cannot serve both"),
        ("a.jsonl", b'{"sentence": "x", "label": 1}\n{"sentence": ', "a.jsonl:2: broken JSON at column 14"),
        ("a.jsonl", b"[1]", "a.jsonl:1: expected a JSON object, found list"),
        ("a.jsonl", b'{"sentence": "\xff"}', "a.jsonl: not UTF-8"),
        ("a.jsonl", b'\n{"text": "x", "label": 1}', "a.jsonl:2: no column 'sentence'; .*; rename yours, or"),
        ("a.jsonl", b'{"sentence": "x", "label": 5}', "a.jsonl:1: column 'label': 5 is none of the labels"),
        ("a.csv", b"sentence,label\nx", "a.csv:2: the row has not as many fields as the header"),
        ("a.csv", b"sentence,label\nx,1,2", "a.csv:2: the row has not as many fields as the header"),
        ("a.csv", b'sentence,label\n"x"y,1', "a.csv:2: broken CSV"),
        ("a.json", b'{"sentence": "x", "label": 1}', "a.json: expected an array of JSON objects; one object a line"),
        (
            "a.json",
            b'{"sentence": "x"}\n{"sentence": "y"}',
            "expected an array of JSON objects; one object a line belongs",
        ),
        ("a.json", b'[{"sentence": "x"},\n {"sentence": ]', "a.json: broken JSON at line 2, column 15"),
        ("a.json", b'[{"sentence": "x", "label": 1}, 2]', "a.json row 2: expected a JSON object, found int"),
        ("a.parquet", b"PAR1", "a.parquet: broken Parquet"),
        ("a.txt", b"x", "a.txt: expected a .jsonl, .json, .csv or .parquet file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_rows(SST2, tmp_path / name, "train")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        load_rows(SST2, tmp_path / "nowhere", "train")
    (tmp_path / "dev.jsonl").touch()
    with pytest.raises(
        UserError, match=r"no train.jsonl \(.jsonl, .json, .csv or .parquet\); the folder holds dev.jsonl"
    ):
        load_rows(SST2, tmp_path, "train")


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_files_of_other_formats(suffix: str, tmp_path: Path) -> None:
    file, rows = tmp_path / f"train{suffix}", [*rows_of(20)]
    if suffix == ".json":
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        datasets.Dataset.from_list(rows).to_parquet(file)
    assert load_rows(SST2, tmp_path, "train") == rows
    assert load_rows(SST2, file, "validation") == rows[-2:]


@pytest.mark.parametrize(
    ("splits", "read"),
    [
        (["train", "validation", "test"], ["train", "validation"]),
        (["train_sft", "test_sft", "train_gen"], ["train_sft", "test_sft"]),
        (["train"], ["train", "train"]),
    ],
)
def test_own_data_set_of_the_hub(splits: list[str], read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, asked = [], []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *which: asked.append(which) or splits)
    monkeypatch.setattr(datasets, "load_dataset", lambda *which, split: calls.append((*which, split)) or rows_of(20))
    found = [load_rows(SST2, Path("owner/films:short"), split) for split in ("train", "validation")]
    assert asked[0] == ("owner/films", "short") and calls == [("owner/films", "short", split) for split in read]
    held = read == ["train", "train"]
    assert found == ([rows_of(20)[:-2], rows_of(20)[-2:]] if held else [rows_of(20)] * 2)


def test_own_data_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["test"])
    with pytest.raises(UserError, match="owner/films: no split train; the data set has test"):
        load_rows(SST2, "owner/films", "train")

    def unreachable(*_: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(UserError, match="no such file or folder, and not to be had from the hub: ConnectionError: C"):
        load_rows(SST2, "owner/films", "train")
    with pytest.raises(UserError, match=r"owner/films\.jsonl: no such file or folder$"):
        load_rows(SST2, "owner/films.jsonl", "train")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(UserError, match=r"owner/films: no such file or folder$"):
        load_rows(SST2, "owner/films", "train")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, config: str | None, *, split: str, revision: str | None = None) -> datasets.Dataset:
        calls.append((path, config, split, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found glue.py")
        return datasets.Dataset.from_list(rows_of(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows(SST2, None, "validation") == rows_of(3)
    assert calls[-1] == ("nyu-mll/glue", "sst2", "validation", "refs/convert/parquet")
    with pytest.raises(UserError, match="CogComp/trec test row 0: no column 'text'"):
        load_rows(load_task("trec"), None, "validation")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="ConnectionError: Couldn't reach the hub; pass --data") as caught:
        load_rows(SST2, None, "train")
    assert "\n" not in str(caught.value)


def test_draws_are_reproducible_and_private() -> None:
    rows = rows_of(100)
    state = random.getstate()
    drawn = sample(rows, 10, seed=1)
    rest, held = hold_out(rows, 10, seed=1)
    assert random.getstate() == state
    assert drawn == sample(rows, 10, seed=1) != sample(rows, 10, seed=2)
    assert sorted(drawn, key=rows.index) == drawn and len(drawn) == 10
    assert sorted(rest + held, key=rows.index) == rows and len(held) == 10
    assert sample(rows, 1000, seed=0) == rows
    with pytest.raises(UserError, match="cannot hold 100 rows out of 100"):
        hold_out(rows, 100, seed=0)
