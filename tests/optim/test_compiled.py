"""A model compiled with torch.compile is probed as it was written: what is compiled may miss hooks and lent parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .models import llama, token_batch
from .table import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_estimates_of_a_compiled_model_are_those_of_the_model(method: str) -> None:
    torch.compiler.reset()
    ran = 0

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal ran
            ran += 1
            return graph(*args)

        return run

    losses = []
    for compiled in (False, True):
        model, batch = llama(), token_batch()
        if compiled:
            model.compile(backend=compiler)
        model(**batch)
        optimizer = METHODS[method](model, lr=1e-2)
        before = ran
        losses.append([optimizer.step(lambda: model(**batch).loss) for _ in range(3)])
        assert ran == before
    assert ran > 0
    assert losses[0] == losses[1]
