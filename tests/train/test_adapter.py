"""Training that begins with a PEFT adapter: its own parameters, or coefficients that go on from it."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import DeepseekV3Config, MambaConfig

import zoft
from optim.mixtures import CONFIGS, model_of
from optim.models import GROUPED, SIZES, build, changed, llama, snapshot, token_batch
from scripts import load
from zoft.errors import UserError
from zoft.train.adapter import not_loaded, save_adapter, start_from, take_apart

RANDOM = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
LINEAR = ["k_proj", "v_proj", "down_proj"]


def lora(**options: Any) -> PeftModel:
    """The tiny model with an adapter that is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(llama(), LoraConfig(r=3, lora_alpha=6, **RANDOM | options))
    return adapted.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**token_batch()).logits


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
@pytest.mark.parametrize("method", [zoft.ZOAct, zoft.Guided])
def test_coefficients_begin_with_the_adapter(method: Any, options: dict[str, Any]) -> None:
    expected = logits(lora(**options))
    model, factors = take_apart(lora(**options))
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    start_from(method(model, lr=1e-3, exclude=()), factors)
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_layers_that_shared_a_basis_share_it_again(tmp_path: Path) -> None:
    model, batch = llama(), token_batch()
    closure = lambda: zoft.cross_entropy(model(**batch).logits, batch["labels"])  # noqa: E731
    optimizer = zoft.Guided(model, lr=0.1, attention=True, train_bases=True)
    for _ in range(3):
        optimizer.step(closure)
    save_adapter(optimizer, tmp_path)
    plain, factors = take_apart(PeftModel.from_pretrained(llama(), tmp_path))
    again = zoft.Guided(plain, attention=True, train_bases=True)
    start_from(again, factors)
    groups = [
        {frozenset(name for name in each.bases if each.bases[name] is basis) for basis in each.bases.values()}
        for each in (optimizer, again)
    ]
    assert groups[0] == groups[1] and len(groups[0]) == 4 * len(model.model.layers)


LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def deepseek() -> Any:
    """A feed-forward part, then experts, one of which all tokens share."""
    sizes = GROUPED | {"num_key_value_heads": 4}
    return build(DeepseekV3Config(**sizes, **LATENT, **EXPERTS, first_k_dense_replace=1))


@pytest.mark.parametrize("include", [(), ("*.gate_proj", "*.o_proj")])
@pytest.mark.parametrize("method", [zoft.ZOAct, zoft.Guided])
def test_layers_with_the_names_of_experts(method: Any, include: tuple[str, ...], tmp_path: Path) -> None:
    """Once they were lost: PEFT took them for the experts, some of which it had by these names."""
    model, batch = deepseek(), token_batch()
    optimizer = method(model, lr=0.1, rank=9, include=include)
    optimizer.step(lambda: zoft.cross_entropy(model(**batch).logits, batch["labels"]))
    if method is zoft.ZOAct and not include:
        assert len({basis.shape[1] for basis in optimizer.bases.values()}) == 2
    save_adapter(optimizer, tmp_path)
    learned = logits(model)
    saved = PeftModel.from_pretrained(deepseek(), tmp_path).eval()
    assert torch.allclose(logits(saved), learned, atol=1e-4)
    assert not torch.allclose(logits(deepseek()), learned, atol=0.1)
    plain, factors = take_apart(saved)
    again = method(plain, lr=0.1, include=include)
    start_from(again, factors)
    assert torch.allclose(logits(plain), learned, atol=1e-4)
    save_adapter(again, tmp_path / "again")
    assert torch.allclose(logits(PeftModel.from_pretrained(deepseek(), tmp_path / "again").eval()), learned, atol=1e-4)


@pytest.mark.parametrize("include", [("*.experts.*",), ("*.down_proj.*", "*.q_proj"), ("*.experts.gate_up_proj.1",)])
@pytest.mark.parametrize("name", CONFIGS)
def test_experts_that_share_a_parameter(name: str, include: tuple[str, ...], tmp_path: Path) -> None:
    model, batch = model_of(name), token_batch(batch=1, length=5)
    optimizer = zoft.ZOAct(model, lr=0.1, rank=3, include=include)
    optimizer.step(lambda: zoft.cross_entropy(model(**batch).logits, batch["labels"]))
    fused = [m for m in optimizer.maps if m.fused is not None]
    trained = [m.name for m in fused if m.name in optimizer.bases]
    assert trained and (len(trained) < len(fused) or len(include[0]) > 15)  # some experts saw no token
    save_adapter(optimizer, tmp_path)
    learned = logits(model)
    saved = PeftModel.from_pretrained(model_of(name), tmp_path).eval()
    torch.testing.assert_close(logits(saved), learned, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model_of(name)), learned, atol=0.01)
    plain, factors = take_apart(saved)
    assert factors.keys() == optimizer.bases.keys()
    again = zoft.ZOAct(plain, lr=0.1, include=include)
    start_from(again, factors)
    torch.testing.assert_close(logits(plain), learned, rtol=1e-4, atol=1e-5)


def test_what_peft_does_not_load_is_not_saved(tmp_path: Path) -> None:
    model, batch = build(MambaConfig(**SIZES, state_size=8)), token_batch()

    def closure() -> Any:
        return zoft.cross_entropy(model(batch["input_ids"]).logits, batch["labels"])

    optimizer = zoft.ZOAct(model, lr=0.1)
    optimizer.step(closure)
    with pytest.raises(UserError, match=r"leave such layers out with exclude=\('\*.out_proj',\)"):
        save_adapter(optimizer, tmp_path)
    optimizer.branches.detach()
    optimizer = zoft.ZOAct(model, lr=0.1, exclude=("*.out_proj",))
    optimizer.step(closure)
    save_adapter(optimizer, tmp_path)
    with torch.no_grad():
        learned = closure().values
        optimizer.branches.detach()
        model = PeftModel.from_pretrained(model, tmp_path).eval()
        torch.testing.assert_close(closure().values, learned)


@pytest.mark.parametrize("kind", ["laguna", "git", "falcon_h1"])
def test_all_other_layers_are_loaded(kind: str, tmp_path: Path) -> None:
    """Once Laguna's shared experts were lost, and GIT's adapter not to be loaded."""
    make = partial(load("benchmarks/every_model.py").build, kind)
    model, ids = make(), torch.arange(3, 27).view(3, 8)
    optimizer = zoft.ZOAct(model, lr=0.1, exclude=not_loaded(model))
    optimizer.step(lambda: zoft.cross_entropy(model(ids).logits, ids))
    save_adapter(optimizer, tmp_path)
    with torch.no_grad():
        found = PeftModel.from_pretrained(make(), tmp_path).eval()(input_ids=ids).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(make()(ids).logits, found, atol=1e-2)


def test_what_was_learned_before_is_saved_again(tmp_path: Path) -> None:
    """Layers that the second training does not reach keep what the first has added."""
    model, factors = take_apart(lora())
    optimizer, batch = zoft.Guided(model, lr=1e-3), token_batch()
    start_from(optimizer, factors)
    for _ in range(2):
        optimizer.step(lambda: zoft.cross_entropy(model(**batch).logits, batch["labels"]))
    save_adapter(optimizer, tmp_path)
    saved = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.allclose(logits(saved), logits(model), atol=1e-5)
    assert not torch.allclose(logits(saved), logits(lora()), atol=1e-3)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}])
def test_coefficients_are_plain_lora(options: dict[str, Any]) -> None:
    targets = {} if "modules_to_save" not in options else {"target_modules": LINEAR}
    with pytest.raises(UserError, match="more than LoRA"):
        take_apart(lora(**options, **targets))


def test_every_layer_of_the_adapter_is_trained() -> None:
    model, factors = take_apart(lora())
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.down_proj', which"):
        start_from(zoft.ZOAct(model, exclude=("*.down_proj",)), factors)


@pytest.mark.parametrize("method", [zoft.AGZO, zoft.LOZO, zoft.MeZO])
def test_an_adapters_own_parameters(method: Any) -> None:
    model = lora()
    before, batch = snapshot(model), token_batch()
    optimizer = method(model, lr=1e-3)
    for _ in range(2):
        optimizer.step(lambda: model(**batch).loss)
    moved = changed(model, before)
    assert moved == {name for name in before if "lora_" in name}


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ],
)
def test_mezo_trains_other_adapters(config: Any) -> None:
    model = get_peft_model(llama(), config).eval()
    before, batch = snapshot(model), token_batch()
    optimizer = zoft.MeZO(model, lr=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not read through their own module")
        optimizer.step(lambda: model(**batch).loss)
    assert optimizer.counters.zero == 0
    assert changed(model, before) == {name for name, p in model.named_parameters() if p.requires_grad}
