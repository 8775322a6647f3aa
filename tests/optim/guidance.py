"""Models whose residual stream is known, and autograd's gradient without the ways that the guided estimate neglects."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ApertusConfig,
    BartConfig,
    BertConfig,
    CohereConfig,
    Glm4MoeConfig,
    GlmConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    MiniMaxConfig,
    MixtralConfig,
    Olmo2Config,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    RobertaPreLayerNormConfig,
)

from zoft.optim import Guided, Loss, cross_entropy
from zoft.optim.stream import Stream, find_stream

from .models import ARCHITECTURES, GROUPED, SIZES, build, token_batch

GRANITE = {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.5}
SHARED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.1, "activation_function": "gelu"}
BART = {"vocab_size": 64, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: make for name, (make, _) in ARCHITECTURES.items()},
    "granite": lambda: build(GraniteConfig(**GROUPED, **GRANITE)),
    "olmo2": lambda: build(Olmo2Config(**GROUPED)),
    "gpt-neox": lambda: build(GPTNeoXConfig(**SIZES, intermediate_size=48, tie_word_embeddings=False)),
    "gpt-neox sequential": lambda: build(GPTNeoXConfig(**SIZES, intermediate_size=48, use_parallel_residual=False)),
    "cohere": lambda: build(CohereConfig(**GROUPED, logit_scale=0.25)),
    "phi": lambda: build(PhiConfig(**SIZES, intermediate_size=48)),
    "phi3": lambda: build(Phi3Config(**GROUPED)),
    "glm": lambda: build(GlmConfig(**GROUPED, head_dim=8)),
    "lfm2": lambda: build(Lfm2Config(**GROUPED, layer_types=["full_attention"] * 2)),
    "apertus": lambda: build(ApertusConfig(**GROUPED)),
    "mixtral": lambda: build(MixtralConfig(**GROUPED, num_local_experts=2)),
    "glm4 moe": lambda: build(Glm4MoeConfig(**GROUPED, **SHARED, head_dim=8)),
    "roberta before its head": lambda: build(RobertaPreLayerNormConfig(**SIZES, intermediate_size=48, is_decoder=True)),
}
BUILDERS |= (
    NORMALISED := {  # the stream itself, block by block
        "bert": lambda: build(BertConfig(**SIZES, intermediate_size=48, is_decoder=True)),
        "bart": lambda: build(BartConfig(**BART)),
        "openai-gpt": lambda: build(OpenAIGPTConfig(**SIZES, n_positions=64)),
        "opt normalised": lambda: build(OPTConfig(**OPT, do_layer_norm_before=False)),
        "minimax": lambda: build(MiniMaxConfig(**GROUPED, num_local_experts=2, layer_types=["full_attention"] * 2)),
    }
)
FUSED = ("gpt2", "gpt-neox", "gpt-neox sequential", "phi3")  # queries, keys and values are made by one matrix
# Parts that the error does not go through.
NEGLECTED = {
    "mixtral": ("mlp",),
    "minimax": ("mlp",),
    "glm4 moe": ("experts", "gate"),
    "openai-gpt": ("attn",),
}


def closure_of(model: nn.Module, batch: dict[str, Tensor], **options: int) -> Callable[[], Loss]:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return lambda: cross_entropy(model(**inputs, **options).logits, batch["labels"])


def stream_of(model: nn.Module) -> Stream:
    with torch.no_grad():
        found = find_stream(model, closure_of(model, token_batch()))
    assert found is not None
    return found


def names(stream: Stream) -> list[str]:
    return [writer.map.name for block in stream.blocks for writer in block.writers]


@contextmanager
def detached(model: nn.Module, kinds: tuple[str, ...]) -> Iterator[None]:
    """While open, no gradient flows to what modules of these names were called with."""

    def cut(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        def detach(value: object) -> object:
            return value.detach() if isinstance(value, Tensor) else value

        return tuple(detach(a) for a in args), {k: detach(v) for k, v in kwargs.items()}

    inner = [m for name, m in model.named_modules() if name.rpartition(".")[2] in kinds]
    assert inner or not kinds
    handles = [m.register_forward_pre_hook(cut, with_kwargs=True) for m in inner]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def detached_attention() -> Iterator[None]:
    """While open, no gradient flows through attention."""
    attention = F.scaled_dot_product_attention

    def fixed(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
        return attention(query.detach(), key.detach(), value.detach(), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", fixed)
        yield


def gradient(optimizer: Guided, closure: Callable[[], Loss]) -> dict[str, Tensor]:
    """What autograd says of the optimizer's maps, [d_out, d_in]."""
    weights = [m.weight for m in optimizer.maps]
    found = torch.autograd.grad(closure().values.float(), weights, allow_unused=True)
    pairs = zip(optimizer.maps, found, strict=True)
    return {m.name: (g.t() if m.transposed else g).float() for m, g in pairs if g is not None}


def estimated(optimizer: Guided, closure: Callable[[], Loss]) -> dict[str, Tensor]:
    optimizer.estimate(closure)
    estimate = optimizer.take_estimate()
    assert estimate is not None
    return {name: factor @ optimizer.bases[name].t() for name, factor in estimate.factors.items()}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
