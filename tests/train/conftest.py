from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """transformers' own training arguments, as a user of `ZOTrainer` writes them."""

    def make(**options: Any) -> TrainingArguments:
        plain = {"output_dir": str(tmp_path / "out"), "report_to": "none", "disable_tqdm": True, "use_cpu": True}
        return TrainingArguments(**plain | options)

    return make
