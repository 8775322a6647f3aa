"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoft.train.files import free_folder, read_json, write_json


def test_free_folder_is_never_one_that_is_there(tmp_path: Path) -> None:
    found = []
    for _ in range(3):
        folder = free_folder(tmp_path / "demo")
        folder.mkdir()
        found.append(folder.name)
    assert found == ["demo", "demo-2", "demo-3"]


def test_a_value_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"kept": "ä"})
    with pytest.raises(TypeError):
        write_json(path, {"lost": object()})
    assert read_json(path) == {"kept": "ä"}
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]
