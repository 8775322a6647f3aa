"""A run folder: held by one process, its checkpoints whole, checked and never lost."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout
from transformers.trainer_utils import get_last_checkpoint

from zoft.errors import UserError
from zoft.train.files import locked, read_json, write_json
from zoft.train.identity import require_same

LOCK, SAVING, REMOVED = ".lock", ".saving", ".removed"
SEAL = "seal.json"
FORMAT = 1
BLOCK = 1 << 22  # bytes read at a time


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the run folder `out`, and make it if it is not there; it goes again if nothing was written.

    Raises:
        UserError: another process holds it.
    """
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if made:
            stack.callback(_remove_empty, out)
        try:
            stack.enter_context(locked(out / LOCK))
        except Timeout:
            remedy = "wait until it ends, or choose another --out"
            raise UserError(f"{out}: another process is at this run; {remedy}") from None
        for left in (SAVING, REMOVED):  # by a process that was killed
            shutil.rmtree(out / left, ignore_errors=True)
        yield


def _remove_empty(out: Path) -> None:
    if not [path for path in out.iterdir() if path.name != LOCK]:
        shutil.rmtree(out)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` once all of it is on the disk."""
    saving = target.parent / SAVING
    shutil.rmtree(saving, ignore_errors=True)
    aside = saving / target.name
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            _sync(path)
        if target.exists():
            remove(target)
        aside.rename(target)
        _sync(target.parent)
    except Exception as error:
        if isinstance(error, OSError) or shutil.disk_usage(saving).free > BLOCK:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error  # torch.save does not say so
    finally:
        shutil.rmtree(saving, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete `folder`: under its name it is whole until it is gone."""
    removed = folder.parent / REMOVED
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def seal(checkpoint: Path, run: dict[str, Any]) -> None:
    """Note in `checkpoint` which `run` it is of, and the checksums of its files."""
    sums = {path.name: _checksum(path) for path in sorted(checkpoint.iterdir())}
    write_json(checkpoint / SEAL, {"format": FORMAT, "run": run, "crc32": sums})


def last_checkpoint(out: Path, run: dict[str, Any]) -> Path | None:
    """The checkpoint in `out` to go on from; None if `run` has to begin again.

    Raises:
        UserError: a checkpoint is damaged, or of another run or version, or the run is finished.
    """
    for folder in sorted(out.glob("checkpoint-*")):
        _require_sound(folder, run)
    found = get_last_checkpoint(str(out))
    if found is None and (out / "summary.json").is_file():
        raise UserError(f"{out} is finished and has no checkpoint to go on from; train with --save-steps to keep one")
    return Path(found) if found else None


def _require_sound(checkpoint: Path, run: dict[str, Any]) -> None:
    remedy = "move this folder away to go on from the checkpoint before, or from the beginning"
    if not (checkpoint / SEAL).is_file():
        return  # of an earlier version, which made none
    try:
        found = read_json(checkpoint / SEAL)
        version, then, sums = found["format"], found["run"], found["crc32"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / SEAL} is damaged: {remedy}") from error
    if version != FORMAT:
        raise UserError(f"{checkpoint} was made by another version of zoft ({then.get('zoft_version')}): {remedy}")
    require_same(run, then, checkpoint)
    for name, checksum in sums.items():
        path = checkpoint / Path(name).name
        if not path.is_file() or _checksum(path) != checksum:
            raise UserError(f"{path} is {'damaged' if path.is_file() else 'missing'}: {remedy}")


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(path: Path) -> None:
    """Have the disk hold what was written to `path`, a file or a folder, before what is written later."""
    if os.name == "nt":
        return  # where neither a folder nor a file opened for reading can be synchronised
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
