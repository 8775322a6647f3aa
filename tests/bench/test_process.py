"""`zoft.bench.process`: what becomes of a run whose suite is ended."""

import subprocess
import sys
import time
from pathlib import Path

SUITE = """
import signal, sys
from zoft.bench.process import _ended
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
_ended([sys.executable, "-c", sys.argv[1], sys.argv[2]], {})
"""
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


def test_it_has_time_for_its_checkpoint(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SUITE, RUN, str(tmp_path)]) as suite:
        while not (tmp_path / "begun").exists():
            assert suite.poll() is None
            time.sleep(0.01)
        suite.terminate()
    assert suite.returncode == 143
    assert (tmp_path / "checkpoint").exists()
