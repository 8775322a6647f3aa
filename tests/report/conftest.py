import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_runs import CONFIG, EXAMPLES, LINES, SUMMARY


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder: a finished run of 300 steps, unless told otherwise; None leaves a file out."""

    def make(
        lines: Any = LINES, summary: Any = SUMMARY, examples: Any = EXAMPLES, config: Any = CONFIG, name: str = "run"
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for file, content in (("summary.json", summary), ("examples.json", examples)):
            if content is not None:
                (folder / file).write_text(json.dumps(content))
        return folder

    return make
