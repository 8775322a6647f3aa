"""Several processes take the step that one would take alone, and exchange next to nothing for it."""

import json
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from forks import spawn
from zoft.optim import AGZO, AIMZO, LOZO, Guided, Loss, MeZO, ZeroOrder, ZOAct, cross_entropy

from .models import llama, snapshot, token_batch

METHODS: dict[str, Callable[..., ZeroOrder]] = {
    "MeZO": MeZO,
    "LOZO": LOZO,
    "AGZO": AGZO,
    "AGZO rank 4, two-sided": partial(AGZO, rank=4, two_sided=True),
    "AGZO gaussian": partial(AGZO, others="gaussian"),
    "AGZO batched": partial(AGZO, probe_batching=True),
    "AIM-ZO": partial(AIMZO, rank=8, active=3, shared=1),
    "ZO-Act": ZOAct,
    "Guided": Guided,
}
SHARED = {  # more probes than processes
    "MeZO": partial(MeZO, probes=2),
    "AGZO": partial(AGZO, probes=4),
    "AGZO leave-one-out": partial(AGZO, probes=4, leave_one_out=True),
    "AGZO gaussian": partial(AGZO, probes=4, others="gaussian"),
    "LOZO": partial(LOZO, probes=2),
    "ZO-Act": partial(ZOAct, probes=4),
}
STEPS, EXAMPLES = 3, 6


def batches() -> list[dict[str, Tensor]]:
    """Each with examples of several lengths, one label an example: at its last token."""
    made = [token_batch(batch=EXAMPLES, length=7, seed=i) for i in range(STEPS)]
    for batch in made:
        last = batch["attention_mask"].sum(1) - 1
        batch["labels"] = torch.full_like(batch["labels"], -100)
        batch["labels"][torch.arange(EXAMPLES), last] = torch.arange(EXAMPLES) + 10
    return made


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    """One an example: ranks have parts of unequal sizes."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    whole = cross_entropy(logits, batch["labels"])
    rows = zip(logits.split(1), batch["labels"].split(1), strict=True)
    return Loss(torch.stack([cross_entropy(one, labels).values for one, labels in rows]), whole.error)


def train(make: Callable[..., ZeroOrder], part: slice, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What has moved, and what was seen, after some steps on `part` of each batch."""
    model = llama()
    optimizer = make(model, lr=1e-2, eps=1e-2, **options)
    losses = []
    for batch in batches():
        own = {name: value[part] for name, value in batch.items()}
        losses.append(float(optimizer.step(lambda own=own: loss_of(model, own)) or 0))
    moved = snapshot(model) | {f"{name} C": c for name, c in optimizer.coefficients.items()}
    return moved, {"losses": losses, "sent": optimizer.ranks.sent, "forwards": optimizer.counters.forwards}


def parts(count: int) -> list[slice]:
    """Of unequal sizes."""
    ends = {1: [6], 2: [4, 6], 4: [1, 2, 4, 6]}[count]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def process(rank: int, count: int, folder: str, way: str) -> None:
    """One rank: every method's training, saved to a file of its own."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    methods = METHODS if way == "data" else SHARED
    part = {"data": parts(count)[rank], "probes": slice(None), "both": parts(2)[rank % 2]}[way]
    parallel = 2 if way == "both" else way
    found = {name: train(make, part, parallel=parallel) for name, make in methods.items()}
    torch.save({name: moved for name, (moved, _) in found.items()}, f"{folder}/{rank}.pt")
    Path(f"{folder}/{rank}.json").write_text(json.dumps({name: facts for name, (_, facts) in found.items()}))
    dist.destroy_process_group()


WAYS = {"2 parts": (2, "data"), "4 parts": (4, "data"), "probes": (2, "probes"), "2 groups": (4, "both")}


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any], list[Any]]:
    """The way, and what every rank has: tensors and facts."""
    count, way = request.param
    folder = tmp_path_factory.mktemp("ranks")
    spawn(process, (count, str(folder), way), nprocs=count)
    tensors = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]
    return way, tensors, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def test_all_ranks_end_bit_for_bit_alike(ran: tuple[str, list[Any], list[Any]]) -> None:
    _, (first, *others), _ = ran
    for other in others:
        for name, moved in first.items():
            assert [key for key, value in moved.items() if not torch.equal(value, other[name][key])] == []


def test_together_they_take_the_steps_of_one(ran: tuple[str, list[Any], list[Any]]) -> None:
    way, (found, *_), (facts, *_) = ran
    start = snapshot(llama())
    for name, make in (METHODS if way == "data" else SHARED).items():
        expected, alone = train(make, slice(None))
        assert alone["sent"] == 0
        assert facts[name]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert any(not torch.equal(value, start[key]) for key, value in expected.items() if key in start) or any(
            bool(value.any()) for key, value in expected.items() if key not in start
        )
        for key, value in expected.items():
            torch.testing.assert_close(found[name][key], value, rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_what_is_exchanged_is_counted(ran: tuple[str, list[Any], list[Any]]) -> None:
    way, tensors, facts = ran
    count = len(tensors)
    if way == "data":
        assert facts[0]["MeZO"]["sent"] == STEPS * (2 + 1) * 8  # two losses and a number of examples
        assert facts[0]["LOZO"]["sent"] == STEPS * (2 + 1) * 8
        widths = [*2 * [32, 32, 32, 48], 32]  # of the inputs of q/k/v, o, gate/up and down, and of the head
        bases = len(widths) * count * 8 + 4 * sum(widths) * 4  # where each one's rows begin, and four products
        assert facts[0]["AGZO"]["sent"] == STEPS * (bases + (1 + 1) * 8 + (2 + 1) * 8)
        assert all(fact["AGZO"]["forwards"] == 2 * STEPS for fact in facts)
    else:
        assert facts[0]["MeZO"]["sent"] == STEPS * (4 + 1) * 8  # four losses and a number of examples
        assert [fact["AGZO"]["forwards"] for fact in facts] == [3 * STEPS] * count  # the centre and two of four


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="parallel must be"):
        AGZO(llama(), parallel="both")
    with pytest.raises(ValueError, match="parallel must be"):
        AGZO(llama(), parallel=0)
    with pytest.raises(ValueError, match="1 processes cannot form 2 groups"):
        AGZO(llama(), parallel=2)
    monkeypatch.setattr("zoft.optim.ranks.Ranks.count", 3)
    model = llama()
    with pytest.raises(ValueError, match="per-example"):
        AGZO(model, per_example=True)
    with pytest.raises(ValueError, match="3 groups of processes share 1 points"):
        AGZO(model, parallel="probes")
    with pytest.raises(ValueError, match="no probes that processes could share"):
        Guided(model, parallel="probes")


def test_what_cannot_be_shared_is_refused_by_a_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """For processes that found one another after the optimizer was made."""
    model, (batch, *_) = llama(), batches()
    optimizer = AGZO(model, per_example=True)
    monkeypatch.setattr("zoft.optim.ranks.Ranks.count", 3)
    with pytest.raises(ValueError, match="per-example"):
        optimizer.step(lambda: loss_of(model, batch))
