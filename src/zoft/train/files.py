"""Files that are whole or not there."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from zoft.errors import UserError
from zoft.numbers import finite


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` aside and rename it into place."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(content)
    os.replace(aside, path)


def write_text(path: Path, text: str) -> None:
    """Write `text` as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, as `write_text` does; null for numbers that JSON does not have."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def free_folder(path: Path) -> Path:
    """`path`, or the first of ``path-2``, ``path-3``, ... that is not there yet."""
    candidates = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(candidate for candidate in candidates if not candidate.exists())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`. The system lets go of it when the process dies, however it does.

    Raises:
        Timeout: another process holds it.
    """
    lock = FileLock(path)
    lock.acquire(timeout=0)
    try:
        yield
    finally:
        if os.name != "nt":  # where a file in use cannot be deleted
            path.unlink(missing_ok=True)
        lock.release()


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """What `write` puts into a folder, complete or not at all.

    Raises:
        UserError: the folder is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        write(aside)
        aside.chmod(0o755)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
