"""Weights in shards (torch's fully_shard): every process writes its rows of what one process would write."""

import itertools
import json
import os
import re
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from forks import spawn
from zoft.optim import AGZO, AIMZO, LOZO, Guided, MeZO, ZeroOrder, ZOAct
from zoft.optim.placement import device_of

from .models import gpt2, llama, tied_llama, token_batch, token_losses

RANKS, STEPS, BATCH = 2, 3, 8
CPU = torch.device("cpu")
Build, Make = Callable[[], Any], Callable[..., ZeroOrder]


def half(build: Callable[..., Any] = llama) -> Any:
    """In bfloat16; one row more than two processes share evenly."""
    return (build(vocab_size=65) if build is not gpt2 else build()).bfloat16()


CASES: dict[str, tuple[Build, Make]] = {
    "ZO-Act": (llama, ZOAct),
    "ZO-Act batched": (llama, partial(ZOAct, probe_batching=True)),
    "AGZO": (llama, AGZO),
    "AGZO in the second block": (llama, partial(AGZO, include=["*.1.*"])),
    "AGZO gaussian": (llama, partial(AGZO, others="gaussian")),
    "AGZO bfloat16": (half, AGZO),
    "AGZO bfloat16, folded": (half, partial(AGZO, fold_every=2)),
    "AGZO bfloat16, transposed": (partial(half, gpt2), AGZO),
    "AGZO bfloat16, HSDP": (half, AGZO),
    "AIM-ZO": (llama, partial(AIMZO, rank=8, active=3, shared=1)),
    "LOZO bfloat16": (partial(half, tied_llama), LOZO),
    "LOZO-M of matrices": (llama, partial(LOZO, momentum=0.9, others="frozen")),
    "MeZO bfloat16": (partial(half, tied_llama), MeZO),
    "AGZO, probes shared": (llama, partial(AGZO, probes=4, parallel="probes")),
}


def shard(model: Any, **where: Any) -> Any:
    for block in model.model.layers if hasattr(model, "model") else model.transformer.h:
        fully_shard(block, **where)
    return fully_shard(model, **where)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: nn.Module, make: Make, part: slice) -> tuple[dict[str, Tensor], dict[str, Any], ZeroOrder]:
    """What there is after some steps on `part` of each batch, and the losses on another batch between them."""
    optimizer, losses = make(model, lr=1e-2, eps=0.1), []
    for step in range(STEPS):
        own = {name: value[part] for name, value in token_batch(batch=BATCH, seed=step).items()}
        optimizer.step(lambda own=own: token_losses(model, own))
        with torch.no_grad():
            losses.append(token_losses(model, token_batch(seed=9)).tolist())
    kept = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    found = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    return (
        found | {f"{name} C": c for name, c in optimizer.coefficients.items()},
        {"losses": losses, "kept": kept},
        optimizer,
    )


def by_transformers(folder: str, **sizes: int) -> Any:
    where = DistributedConfig(**sizes)
    return AutoModelForCausalLM.from_pretrained(f"{folder}/model", distributed_config=where).eval()


def too_late(model: Any) -> None:
    optimizer = AGZO(model)
    shard(model)
    optimizer.step(lambda: token_losses(model, token_batch()))


REFUSED: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any]]] = {
    "guided reads weights between forwards": (lambda _: shard(llama()), Guided),
    "an update with a state .* moves only matrices in shards": (lambda _: shard(llama()), partial(LOZO, momentum=0.9)),
    "2 groups of processes cannot share 3 points evenly": (
        lambda _: shard(llama()),
        partial(AGZO, probes=3, parallel="probes"),
    ),
    "shard the model with fully_shard": (lambda _: FullyShardedDataParallel(llama(), device_id=CPU), ZOAct),
    "is split by tensor parallelism: .* fully_shard": (lambda folder: by_transformers(folder, tp_size=RANKS), ZOAct),
    "'model.embed_tokens.weight' is split by": (lambda folder: by_transformers(folder, tp_size=RANKS), AGZO),
    "sharded after the optimizer was made": (lambda _: llama(), too_late),
}


def refusal(model: Any, make: Callable[[Any], Any]) -> str:
    """What is said of it."""
    with pytest.raises(ValueError) as said:
        make(model)
    return str(said.value)


def waiting_in_memory() -> nn.Module:
    """A layer whose shard lies elsewhere than it is computed, as fully_shard's CPU offloading has it."""
    layer = nn.Linear(4, 4, bias=False)
    shard = DTensor.from_local(torch.empty(2, 4, device="meta"), init_device_mesh("cpu", (RANKS,)), [Shard(0)])
    layer.weight = nn.Parameter(shard)
    return layer


def process(rank: int, folder: str) -> None:
    """One rank: what every case ends with, saved to a file of its own."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    own, tensors, facts = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS), {}, {}
    for name, (build, make) in CASES.items():
        part = slice(None) if "shared" in name else own
        mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("copies", "shards")) if "HSDP" in name else None
        tensors[name], facts[name], optimizer = train(shard(build(), mesh=mesh), make, part)
        if name == "ZO-Act":
            torch.save(optimizer.state_dict(), f"{folder}/state{rank}.pt")
    name, model = "by transformers", by_transformers(folder, fsdp_size=RANKS)
    tensors[name], facts[name], _ = train(model, AGZO, own)
    said = {pattern: refusal(build(folder), make) for pattern, (build, make) in REFUSED.items()}
    assert device_of(waiting_in_memory()) == CPU
    torch.save(tensors, f"{folder}/{rank}.pt")
    Path(f"{folder}/{rank}.json").write_text(json.dumps({"facts": facts, "refused": said}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], list[Any]]:
    """The folder, and what every rank has: tensors and what was seen."""
    folder = tmp_path_factory.mktemp("sharded")
    llama().save_pretrained(folder / "model")
    spawn(process, (str(folder),), nprocs=RANKS)
    tensors = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    return folder, tensors, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def alone(name: str) -> tuple[dict[str, Tensor], dict[str, Any], ZeroOrder]:
    """The case in one process, with the whole batch."""
    build, make = CASES.get(name, (llama, AGZO))
    return train(build(), make, slice(None))


@pytest.mark.parametrize("name", [*CASES, "by transformers"])
def test_processes_end_where_one_ends(ran: tuple[Path, list[Any], list[Any]], name: str) -> None:
    """In half precision bit for bit: the rounding's dither and the noise begin where the shard begins."""
    _, (first, second), (seen, _) = ran
    expected, facts, _ = alone(name)
    exact = "bfloat16" in name
    tolerance = {"rtol": 0, "atol": 0 if exact else 2e-5}
    losses = torch.tensor(facts["losses"])
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(losses))
    torch.testing.assert_close(torch.tensor(seen["facts"][name]["losses"]), losses, **tolerance)
    for key, value in expected.items():
        assert torch.equal(first[name][key], second[name][key]), key
        torch.testing.assert_close(first[name][key], value, **tolerance, msg=lambda m, k=key: f"{k}: {m}")


def test_between_forwards_every_process_holds_its_part_alone(ran: tuple[Path, list[Any], list[Any]]) -> None:
    _, _, seen = ran
    for name in seen[0]["facts"]:
        kept = [one["facts"][name]["kept"] for one in seen]
        assert sum(kept) == alone(name)[1]["kept"]
        assert max(kept) <= 0.51 * sum(kept)


def test_the_state_of_coefficients_is_whole_in_every_process(ran: tuple[Path, list[Any], list[Any]]) -> None:
    folder, _, _ = ran
    _, _, plain = alone("ZO-Act")
    batch = token_batch(seed=STEPS)
    plain.step(lambda: token_losses(plain.model, batch))
    for rank in range(RANKS):
        resumed = ZOAct(llama())
        resumed.load_state_dict(torch.load(folder / f"state{rank}.pt", weights_only=True))
        resumed.step(lambda o=resumed: token_losses(o.model, batch))
        for name, coefficients in plain.coefficients.items():
            torch.testing.assert_close(resumed.coefficients[name], coefficients, rtol=0, atol=2e-5)


def test_what_does_not_fit_shards_is_refused(ran: tuple[Path, list[Any], list[Any]]) -> None:
    _, _, seen = ran
    for one in seen:
        for pattern in REFUSED:
            assert re.search(pattern, one["refused"][pattern])
