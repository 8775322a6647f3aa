"""llama.cpp applies what ``zoft export --to gguf-lora`` writes as transformers applies the update itself."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import xllamacpp
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from zoft.optim.layers import find_linear_maps
from zoft.train.export import ARCHITECTURES, Learned, to_gguf

TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
SHAPE = {"vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "query_pre_attn_scalar": 8}
PROMPT = [1, 60, 61, 258, 70, 200, 5]


def small(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, **HEADS, tie_word_embeddings=True, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).eval()


def write_base(model: Any, file: Path) -> None:
    """The .gguf of `model`, in float32."""
    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "gemma3":
        writer.add_rope_freq_base(1e6)
    if "gemma" in architecture:
        writer.add_sliding_window(64)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([2, 3, 3, *[6] * 256, 1, 1, 1])
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        value = weight.float()
        layer, _, part = name.rpartition(".")
        if architecture == "llama" and layer.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
            value = value.view(heads, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        if "gemma" in architecture and "norm" in name:
            value = value + 1
        writer.add_tensor(f"{names.get_name(layer)}.{part}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_llama_cpp(base: Path, lora: Path | None) -> Tensor:
    """The log-probabilities of the token after PROMPT."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(base), 64, 1, False
    params.cpuparams.n_threads = 1
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    answer = xllamacpp.Server(params).handle_completions(
        {"prompt": PROMPT, "n_predict": 1, "n_probs": len(TOKENS), "temperature": 0.0, "cache_prompt": False}
    )
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found = torch.full((len(TOKENS),), float("nan"))
    for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[token["id"]] = token["logprob"]
    return found


@torch.no_grad()
def by_transformers(model: Any) -> Tensor:
    return model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_llama_cpp_adds_the_update(kind: str, tmp_path: Path) -> None:
    model, base, lora = small(kind), tmp_path / "base.gguf", tmp_path / "lora.gguf"
    write_base(model, base)
    before = by_transformers(model)
    assert torch.allclose(by_llama_cpp(base, None), before, atol=0.02)
    factors = {}
    for i, layer in enumerate(find_linear_maps(model)):
        d_out, d_in = layer.weight.shape
        factors[layer.name] = (torch.randn(d_in, 1 + i % 2) / d_in**0.5, torch.randn(d_out, 1 + i % 2) / d_out**0.5)
    to_gguf(Learned(model, factors, 1.0, []), lora)
    with torch.no_grad():
        for name, (basis, factor) in factors.items():
            model.get_submodule(name).weight += factor @ basis.t()
    after = by_transformers(model)
    assert (after - before).abs().max() > 1
    assert torch.allclose(by_llama_cpp(base, lora), after, atol=0.02)
