"""A model compiled with torch.compile is probed as it was written: compiled code may miss perturbations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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

    def losses(model: nn.Module) -> list[Tensor]:
        batch = token_batch()
        model(**batch)
        optimizer, before = METHODS[method](model, lr=1e-2), ran
        found = [optimizer.step(lambda: model(**batch).loss) for _ in range(3)]
        assert ran == before
        return found

    plain, compiled = llama(), llama()
    compiled.compile(backend=compiler)
    assert losses(compiled) == losses(plain)
    assert ran > 0
