"""`zoft.bench.process`: what becomes of a run whose suite is ended."""

import multiprocessing
import signal
import sys
import time
from pathlib import Path

from forks import WAY
from zoft.bench.process import _ended

RUN = """
import signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(0.5)
    Path(sys.argv[1], "checkpoint").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], "begun").touch()
time.sleep(60)
"""


def suite(folder: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _ended([sys.executable, "-c", RUN, str(folder)], {})


def test_it_has_time_for_its_checkpoint(tmp_path: Path) -> None:
    process = multiprocessing.get_context(WAY).Process(target=suite, args=(tmp_path,))
    process.start()
    while not (tmp_path / "begun").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == 143
    assert (tmp_path / "checkpoint").exists()
