"""The run log: what every step owes to forward passes, in a binary file that is only appended to.

A file is `MAGIC`, whose last byte is the version, and records. A record is the length of its payload and the CRC-32 of
it, both unsigned 32-bit, and the payload; all numbers are little-endian. A payload begins with its kind:

- ``R``, the run: JSON, as `zoft.train.identity` makes it. The first record, and once more if a setting changed.
- ``A``, bases that were taken from activations and stay: a safetensors file, since no noise makes them again.
- ``S``, a step: its number (32 bits), lr (float64), the number of its estimates (16); of each estimate the directions
  (16), the examples that had one of their own each (16; 0: none had), the finite differences (float64), and how many
  cells of a table (32) follow with their indices (32 each): row by row, of each direction the maps that no pass called,
  then the maps in which examples shared one, then the parameters that no pass read.
- ``B``: after so many steps (32 bits) the run went back to what it was after so many (32).

An interrupted write leaves a record that is too short or whose checksum is wrong: everything from there on is torn.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from zoft.errors import UserError
from zoft.optim import Trace, ZeroOrder

LOG = "steps.bin"  # its name in a run folder
MAGIC = b"zoftlog\x01"
RUN, BASES, STEP, BACK = b"R", b"A", b"S", b"B"
_RECORD, _STEP, _ESTIMATE, _BACK = (struct.Struct(f"<{fields}") for fields in ("II", "IdH", "HHI", "II"))


class Step(NamedTuple):
    """Step `number` (from 0) was taken at rate `lr` from estimates that left `traces`."""

    number: int
    lr: float
    traces: list[Trace]


class Back(NamedTuple):
    """After `at` steps the run went back to what it was after `to` of them."""

    at: int
    to: int


class Record(NamedTuple):
    """A payload, its kind and its body, and where in the file it ends."""

    payload: bytes
    end: int

    @property
    def kind(self) -> bytes:
        return self.payload[:1]

    @property
    def body(self) -> bytes:
        return self.payload[1:]

    @property
    def steps(self) -> int:
        """How many steps had been taken once this was done; 0 if it is neither a step nor a going back."""
        number = struct.unpack_from("<I", self.body)[0] if self.kind in (STEP, BACK) else 0
        return number + (self.kind == STEP)


class Log(NamedTuple):
    """The sound records of a file, which has `torn` more bytes."""

    records: list[Record]
    torn: int

    @property
    def steps(self) -> int:
        """How many steps have been taken, those undone later among them."""
        return max(record.steps for record in self.records)

    @property
    def run(self) -> dict[str, Any]:
        """The identity of the run, as it is at last."""
        return json.loads(self.last(RUN) or b"{}")

    def last(self, kind: bytes) -> bytes | None:
        """The body of the latest record of a `kind`, if there is one."""
        return next((record.body for record in reversed(self.records) if record.kind == kind), None)

    def until(self, steps: int) -> Log:
        """The log as it was after so many steps."""
        return Log(list(takewhile(lambda record: record.steps <= steps, self.records)), 0)


def read_log(path: Path) -> Log:
    """What can be read of the log `path`, up to where it is torn.

    Raises:
        UserError: there is no log, or not one of this version.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the run log {path}: {error.strerror}") from error
    if data[: len(MAGIC)] != MAGIC:
        later = data[: len(MAGIC) - 1] == MAGIC[:-1]
        raise UserError(f"{path}: " + ("a run log of another version of zoft" if later else "not a run log"))
    records, place = [], len(MAGIC)
    while place + _RECORD.size <= len(data):
        length, checksum = _RECORD.unpack_from(data, place)
        payload = data[place + _RECORD.size : place + _RECORD.size + length]
        if not payload or len(payload) < length or zlib.crc32(payload) != checksum:
            break  # none is empty: a crash of the machine may leave zeros, and their checksum is right
        place += _RECORD.size + length
        records.append(Record(payload, place))
    if not records or records[0].kind != RUN:
        raise UserError(f"{path}: the run log is damaged at its beginning")
    return Log(records, len(data) - place)


def new_log(run: dict[str, Any]) -> bytes:
    """A file without steps."""
    return MAGIC + _framed(RUN + write_run(run))


def append(path: Path, kind: bytes, body: bytes) -> None:
    """Add a record. Nothing but its own bytes can be lost by an interruption."""
    with path.open("ab") as file:
        file.write(_framed(kind + body))


def _framed(payload: bytes) -> bytes:
    return _RECORD.pack(len(payload), zlib.crc32(payload)) + payload


def write_run(run: dict[str, Any]) -> bytes:
    """The body of a record of the run itself; `json.loads` reads it."""
    return json.dumps(run, ensure_ascii=False).encode()


def write_step(step: Step, names: Sequence[str]) -> bytes:
    """The body of a step; `names` are those of the optimizer's maps and dense parameters, in its order."""
    index = {name: place for place, name in enumerate(names)}
    parts = [_STEP.pack(step.number, step.lr, len(step.traces))]
    for trace in step.traces:
        gradients = torch.stack([*trace.gradients]).numpy() if trace.gradients else np.empty(0)
        rows = [*trace.still, trace.shared, trace.unread]
        cells = sorted(row * len(names) + index[name] for row, some in enumerate(rows) for name in some)
        examples = gradients.shape[1] if gradients.ndim > 1 else 0
        parts += [_ESTIMATE.pack(len(gradients), examples, len(cells))]
        parts += [gradients.astype("<f8").tobytes(), np.array(cells, "<u4").tobytes()]
    return b"".join(parts)


def read_step(body: bytes, names: Sequence[str]) -> Step:
    """The step that `write_step` wrote, with the same `names`."""
    number, lr, estimates = _STEP.unpack_from(body)
    place, traces = _STEP.size, []
    for _ in range(estimates):
        directions, examples, cells = _ESTIMATE.unpack_from(body, place)
        place += _ESTIMATE.size
        gradients = np.frombuffer(body, "<f8", directions * (examples or 1), place).astype(float)
        place += gradients.nbytes
        rows: list[set[str]] = [set() for _ in range(directions + 2)]
        for cell in np.frombuffer(body, "<u4", cells, place).tolist():
            rows[cell // len(names)].add(names[cell % len(names)])
        place += 4 * cells
        found = torch.from_numpy(gradients.reshape(directions, examples) if examples else gradients)
        traces.append(Trace([*found], rows[:-2], *rows[-2:]))
    return Step(number, lr, traces)


def write_back(back: Back) -> bytes:
    """The body of a going back; `read_back` reads it."""
    return _BACK.pack(*back)


def read_back(body: bytes) -> Back:
    return Back(*_BACK.unpack(body))


def names_of(optimizer: ZeroOrder) -> list[str]:
    """The names that a log of `optimizer`'s steps refers to by number."""
    return [*(m.name for m in optimizer.maps), *optimizer.dense]
