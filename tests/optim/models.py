"""Tiny random models of several architectures, and batches for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
GROUPED: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The model of `config` with random weights, in evaluation mode; biases and norms are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model.eval()


def llama(**options: Any) -> PreTrainedModel:
    return build(LlamaConfig(**{**GROUPED, "tie_word_embeddings": False, **options}))


def tied_llama(**options: Any) -> PreTrainedModel:
    return llama(tie_word_embeddings=True, **options)


def pangu() -> PreTrainedModel:
    """Pangu's layout: Llama with biases on the four attention projections."""
    return llama(attention_bias=True)


def qwen3() -> PreTrainedModel:
    return build(Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True))


def opt() -> PreTrainedModel:
    return build(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, init_std=0.1))


def gpt2() -> PreTrainedModel:
    return build(GPT2Config(**SIZES, n_inner=48))


def gemma3() -> PreTrainedModel:
    return build(Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8))


def layers(count: int, prefix: str, groups: dict[str, tuple[str, ...]]) -> list[str]:
    """Names of the linear layers of `count` blocks."""
    return [f"{prefix}.{i}.{group}{name}" for i in range(count) for group, names in groups.items() for name in names]


_LLAMA_LAYERS = layers(2, "model.layers", {"self_attn.": ATTENTION, "mlp.": MLP})
_OPT_LAYERS = {"self_attn.": ("k_proj", "v_proj", "q_proj", "out_proj"), "": ("fc1", "fc2")}
_GPT2_LAYERS = {"attn.": ("c_attn", "c_proj"), "mlp.": ("c_fc", "c_proj")}

# The model and the names of its linear layers; a head that is tied to the embedding is not one of them.
ARCHITECTURES: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "llama": (llama, [*_LLAMA_LAYERS, "lm_head"]),
    "tied llama": (tied_llama, _LLAMA_LAYERS),
    "pangu": (pangu, [*_LLAMA_LAYERS, "lm_head"]),
    "qwen3": (qwen3, _LLAMA_LAYERS),
    "opt": (opt, layers(2, "model.decoder.layers", _OPT_LAYERS)),
    "gpt2": (gpt2, layers(2, "transformer.h", _GPT2_LAYERS)),
    "gemma3": (gemma3, _LLAMA_LAYERS),
}


def token_batch(batch: int = 8, length: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens with right padding of differing lengths; the labels ignore it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def closure_of(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The mean loss of `model` on `batch`."""
    return lambda: model(**batch).loss


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of each sequence."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    following = batch["labels"][:, 1:]
    each = cross_entropy(logits[:, :-1].transpose(1, 2), following, ignore_index=-100, reduction="none")
    return each.sum(1) / (following != -100).sum(1)


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A classifier of ten features into three classes, with biases and a norm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(10, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters and buffers that are not bit for bit what they were."""
    return {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
