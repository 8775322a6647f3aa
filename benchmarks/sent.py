"""What a process sends in a step, counted without weights and without the other processes, for scale.py.

Every method estimates on a Llama on PyTorch's meta device, in a group of processes of which only the first exists, and
each sum over the group is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from zoft.optim import Guided, ZeroOrder
from zoft.optim.ranks import Ranks
from zoft.optim.stream import find_stream

EXAMPLES = 2  # of a process
FORWARD = -1  # among the messages of a step: a forward begins


class Counted(Ranks):
    """Notes the bytes of every sum; the others' parts are taken to be this one's."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[int] = []

    def sum(self, tensor: Tensor) -> Tensor:
        self.messages.append(tensor.nbytes)
        return tensor * self.count


class OnMeta(nn.Module):
    """A Llama without weights; its caller hands it no tensor, so that nothing looks for the values of one."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        with torch.device("meta"):
            self.llama = LlamaForCausalLM(config).to(torch.bfloat16).eval()

    def forward(self, examples: int, tokens: int) -> None:
        ids = torch.zeros(examples, tokens, dtype=torch.long, device="meta")
        mask = torch.zeros(examples, 1, tokens, tokens, dtype=torch.bfloat16, device="meta")
        self.llama(input_ids=ids, attention_mask=mask, use_cache=False)


@contextmanager
def group(count: int) -> Iterator[None]:
    """While open, this process is the first of `count`; the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sent(make: Callable[..., ZeroOrder], model: OnMeta, processes: int, tokens: int) -> list[list[int]]:
    """The messages of the first step and of the second: bytes of each sum, and FORWARD where a pass begins.

    Each process has EXAMPLES examples, of `tokens` that count for the bases.
    """
    optimizer, ranks = make(model, lr=1.0), Counted()
    optimizer.ranks = ranks

    def closure() -> Tensor:
        ranks.messages.append(FORWARD)
        model(EXAMPLES, tokens)
        return torch.zeros(EXAMPLES, dtype=torch.float64) + len(ranks.messages)  # no two alike: they are compared

    steps = []
    with group(processes):
        for first in (True, False):
            ranks.messages = []
            if isinstance(optimizer, Guided):
                _guided(optimizer, model, first, closure)
            else:
                optimizer.estimate(closure)
                optimizer.take_estimate()
            steps.append(ranks.messages)
    return steps


def _guided(optimizer: Guided, model: OnMeta, first: bool, closure: Callable[[], Tensor]) -> None:
    """Guided's sums in its order; without values there is no error to carry back, so its factors are zeros."""
    ranks = optimizer.ranks
    if first:
        ranks.total(torch.zeros(()))  # whether all have found the stream
        optimizer.calibrate(closure)
        ranks.means(torch.zeros(1, EXAMPLES, dtype=torch.float64), [0], [True])  # whether the loss is finite
    else:
        closure()
    ranks.means(torch.zeros(1, EXAMPLES, dtype=torch.float64), [0], [True])
    reached = _reached(model.llama.config.num_hidden_layers)
    factors = {
        m.name: torch.zeros(m.d_out, optimizer.bases[m.name].shape[1], device="meta")
        for m in optimizer.maps
        if m.name.removeprefix("llama.") in reached
    }
    ranks.average(factors, EXAMPLES)


def _reached(layers: int) -> set[str]:
    """The names of the maps that guided trains, found in a narrow Llama of as many layers, with values."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, vocab_size=50
    )
    torch.manual_seed(0)
    twin = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        stream = find_stream(twin, lambda: twin(input_ids=torch.arange(8).view(1, -1)))
    assert stream is not None
    return stream.reached(feed_forward=True, attention=False)
