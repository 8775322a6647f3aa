"""Weights that are loaded for each forward (accelerate's offloading), and models on several devices."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from zoft.optim import AGZO, LOZO, Guided, MeZO, ZeroOrder, ZOAct, cross_entropy
from zoft.optim.placement import device_of, devices_of
from zoft.train.adapter import save_adapter

from .models import changed, gpt2, llama, snapshot, tied_llama, token_batch, token_losses

STEPS = 3
CPU = torch.device("cpu")


def on_cpu(model: Any, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=CPU)


def on_disk(model: Any, folder: Path) -> nn.Module:
    disk_offload(model, str(folder / "weights"), execution_device=CPU)
    return model


def in_part(model: Any, folder: Path) -> nn.Module:
    """The first block stays, the rest lies on disk."""
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "disk")
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "weights"), force_hooks=True)


def from_file(model: Any, folder: Path) -> nn.Module:
    """As transformers loads it, straight from the checkpoint."""
    model.save_pretrained(folder / "model")
    where = {"device_map": {"model": "disk", "lm_head": "disk"}, "offload_folder": folder / "weights"}
    return AutoModelForCausalLM.from_pretrained(folder / "model", **where)


WAYS: dict[str, Callable[[Any, Path], nn.Module]] = {
    "cpu": on_cpu,
    "disk": on_disk,
    "in part": in_part,
    "from file": from_file,
}


def loss_of(model: nn.Module, batch: dict[str, Tensor], optimizer: ZeroOrder) -> Any:
    if not isinstance(optimizer, Guided):
        return token_losses(model, batch)
    return cross_entropy(model(**{**batch, "labels": None}, use_cache=False).logits, batch["labels"])


def train(optimizer: ZeroOrder, steps: range = range(STEPS)) -> list[float]:
    """The losses of some steps."""
    batches = (token_batch(seed=step) for step in steps)
    return [float(optimizer.step(lambda b=b: loss_of(optimizer.model, b, optimizer)) or 0) for b in batches]


class Counting(Mapping[str, Tensor]):
    """Counts how often each tensor of a weights map is loaded."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, loads: Counter[str]) -> None:
        self.weights, self.name, self.loads = weights, name, loads

    def __getitem__(self, key: str) -> Tensor:
        self.loads[f"{self.name}.{key}"] += 1
        return self.weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def counted(model: nn.Module) -> Counter[str]:
    """How often each weight of the offloaded `model` is loaded from now on."""
    loads: Counter[str] = Counter()
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False):
            hook.weights_map = Counting(hook.weights_map, name, loads)
    return loads


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [ZOAct, Guided, partial(Guided, attention=True)])
def test_an_offloaded_model_takes_the_steps_of_one_in_memory(
    make: Callable[..., ZeroOrder], way: str, tmp_path: Path
) -> None:
    plain, offloaded = make(llama(), lr=1e-2), make(WAYS[way](llama(), tmp_path), lr=1e-2)
    assert any(p.is_meta for p in offloaded.model.parameters())
    assert train(offloaded) == train(plain)
    assert offloaded.coefficients.keys() == plain.coefficients.keys()
    for name, coefficients in plain.coefficients.items():
        assert bool(coefficients.any())
        assert torch.equal(offloaded.coefficients[name], coefficients)


def test_a_checkpoint_and_an_adapter_are_those_of_a_model_in_memory(tmp_path: Path) -> None:
    plain, first = ZOAct(llama(), lr=1e-2), ZOAct(on_disk(llama(), tmp_path / "a"), lr=1e-2)
    train(plain)
    train(first, range(1))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = ZOAct(on_disk(llama(), tmp_path / "b"), lr=1e-2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed, range(1, STEPS))
    for name, optimizer in (("plain", plain), ("resumed", resumed)):
        save_adapter(optimizer, tmp_path / name)
    file = "adapter_model.safetensors"
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()


@pytest.mark.parametrize(("batching", "times"), [(True, 1), (False, 2)])
def test_with_probe_batching_each_weight_is_loaded_once_a_step(batching: bool, times: int, tmp_path: Path) -> None:
    optimizer = ZOAct(on_disk(llama(), tmp_path), probe_batching=batching)
    loads = counted(optimizer.model)
    for step in range(STEPS):
        train(optimizer, range(step, step + 1))
        assert set(loads.values()) == {times}
        assert len(loads) == sum(1 for _ in optimizer.model.parameters())
        loads.clear()


def test_blocks_before_the_first_that_moves_are_loaded_once_a_step(tmp_path: Path) -> None:
    optimizer = ZOAct(on_disk(llama(), tmp_path), probes=3, include=["*.1.*"])
    train(optimizer, range(1))  # a look at the model is part of it
    loads = counted(optimizer.model)
    train(optimizer, range(1, 2))
    times = {name: count for name, count in loads.items() if ".layers." in name}
    assert times == {name: 1 if ".layers.0." in name else 4 for name in times}
    assert len(times) == sum(".layers." in name for name, _ in optimizer.model.named_parameters())


@pytest.mark.parametrize(("few", "again"), [(64, 0), (0, 1)])
def test_guided_loads_what_it_goes_back_through_again(
    few: int, again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what stands before an activation once more, where the loss reads more than `few` rows; not for some of them
    at a time."""
    monkeypatch.setattr("zoft.optim.kept.FEW", few)
    monkeypatch.setattr("zoft.optim.way_back.ROWS", 3)
    optimizer = Guided(on_disk(llama(), tmp_path))
    train(optimizer, range(1))  # a look at the model is part of it
    loads = counted(optimizer.model)
    train(optimizer, range(1, 2))
    times = {name.rpartition(".")[0].rpartition(".")[2]: count for name, count in loads.items()}
    forward = dict.fromkeys(("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "input_layernorm", "norm"), 1)
    back = {"lm_head": 2, "down_proj": 2} | dict.fromkeys(("gate_proj", "up_proj"), 2 + again)
    assert times == forward | back | {"post_attention_layernorm": 1 + again}


def test_guided_reads_transposed_weights_that_are_offloaded(tmp_path: Path) -> None:
    plain, offloaded = Guided(gpt2(), lr=1e-2), Guided(on_disk(gpt2(), tmp_path), lr=1e-2)
    assert train(offloaded) == train(plain)
    assert all(torch.equal(offloaded.coefficients[name], c) for name, c in plain.coefficients.items())


@pytest.mark.parametrize("make", [AGZO, MeZO, LOZO, lambda model: AGZO(model, others="gaussian")])
def test_what_would_write_offloaded_weights_is_refused(make: Callable[..., ZeroOrder], tmp_path: Path) -> None:
    for number, way in enumerate((on_cpu, on_disk, in_part)):
        model = way(tied_llama() if way is not in_part else llama(), tmp_path / str(number))
        with pytest.raises(ValueError, match=r"an offloaded weight, which cannot be written: .*ZOAct"):
            make(model)


@pytest.mark.parametrize("make", [AGZO, LOZO, MeZO])
def test_weights_that_are_in_memory_can_be_written_beside_offloaded_ones(
    make: Callable[..., ZeroOrder], tmp_path: Path
) -> None:
    away = ("*layers.1.*", "model.norm*", "lm_head*")
    plain, partly = (make(model, lr=1e-2, exclude=away) for model in (llama(), in_part(llama(), tmp_path)))
    assert train(partly) == train(plain)
    moved = changed(plain.model, snapshot(llama()))
    assert any(name.startswith("model.layers.0.") for name in moved)
    for name in moved:
        assert torch.equal(partly.model.get_parameter(name), plain.model.get_parameter(name))


class Onto(nn.Module):
    """A layer on a device of its own; accelerate's hook moves its input there."""

    def __init__(self, layer: nn.Module, device: str) -> None:
        super().__init__()
        self.layer = layer.to(device)
        add_hook_to_module(self.layer, AlignDevicesHook(torch.device(device)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def two_devices() -> nn.Sequential:
    """The meta device stands for the second: it has no numbers, but its tensors and others do not mix."""
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Onto(nn.Linear(5, 4), "meta"))


@pytest.mark.parametrize("options", [{}, {"probes": 2, "per_example": True}, {"probe_batching": True}], ids=str)
def test_each_layer_has_its_tensors_on_its_own_device(options: dict[str, Any]) -> None:
    model, x = two_devices(), torch.ones(3, 6)
    optimizer = ZOAct(model, rank=2, exclude=(), **options)
    losses = iter(range(100))

    def closure() -> Tensor:
        model(x)
        return torch.full((3,), float(next(losses)))

    for _ in range(2):
        optimizer.step(closure)
    devices = {"0": "cpu", "2.layer": "meta"}
    assert {m.name: m.device.type for m in optimizer.maps} == devices
    kept = (optimizer.bases, optimizer.coefficients, {name: s["mean"] for name, s in optimizer.updates.items()})
    for tensors in kept:
        assert {name: tensor.device.type for name, tensor in tensors.items()} == devices
    again = ZOAct(two_devices(), rank=2, exclude=(), **options)
    again.load_state_dict(optimizer.state_dict())
    assert {name: tensor.device.type for name, tensor in again.bases.items()} == devices


def test_offloaded_modules_are_where_they_compute() -> None:
    model = cpu_offload(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), execution_device=CPU)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert device_of(model) == CPU
    assert devices_of(nn.Sequential(model, two_devices())) == {CPU, torch.device("meta")}
    elsewhere = cpu_offload(nn.Sequential(nn.Linear(2, 2)), execution_device=CPU)
    elsewhere[0]._hf_hook.execution_device = "cuda:1"
    assert device_of(elsewhere) == torch.device("cuda:1")


def test_every_forward_has_the_random_state_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices that only count what was drawn on them; each forward draws on both."""
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    state = {first: 10, second: 20}
    generators = SimpleNamespace(
        device_count=lambda: 2, get_rng_state=state.__getitem__, set_rng_state=lambda s, d: state.update({d: s})
    )
    monkeypatch.setattr("zoft.optim.landscape.devices_of", lambda model: {first, second})
    monkeypatch.setattr("torch.get_device_module", lambda device: generators)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    seen, model = [], nn.Sequential(nn.Linear(3, 2))

    def closure() -> Tensor:
        seen.append(dict(state))
        state.update({first: state[first] + 1, second: state[second] + 2})
        return model(torch.ones(4, 3)).square().mean()

    MeZO(model).step(closure)
    assert seen == [{first: 10, second: 20}] * 2
    assert state == {first: 11, second: 22}
