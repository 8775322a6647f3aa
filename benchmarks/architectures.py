"""What zoft finds in models of many kinds, and how well its estimates point there: tiny models, random weights.

    python benchmarks/architectures.py

Of each: the share of the parameters that lie in linear maps (which have an activation basis), the share of those maps'
squared gradient that AGZO's rank 1 catches, its cosine with their gradient beside the theorem's prediction (100
estimates), and guided's cosine, where there is a residual stream for it. Writes results/architectures.json and .md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from zoft.bench.align import align
from zoft.optim import AGZO, Guided, NoStream
from zoft.optim.layers import find_linear_maps
from zoft.train.files import write_json, write_text

ESTIMATES, BATCH, LENGTH, VOCABULARY = 100, 8, 16, 64
WIDTH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
GROUPED = WIDTH | {"intermediate_size": 128, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 16}
DELTA: dict[str, Any] = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
DELTA |= {"linear_value_head_dim": 16, "head_dim": 16}
HYBRID = ["linear_attention", "full_attention"]
CAUSAL, CLASSIFY = tf.AutoModelForCausalLM, tf.AutoModelForSequenceClassification
MODELS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "Llama": (CAUSAL, lambda: tf.LlamaConfig(**GROUPED)),
    "Pangu (Llama with biases)": (CAUSAL, lambda: tf.LlamaConfig(**GROUPED, attention_bias=True)),
    "Qwen3": (CAUSAL, lambda: tf.Qwen3Config(**GROUPED, head_dim=16)),
    "Gemma 2": (CAUSAL, lambda: tf.Gemma2Config(**GROUPED, head_dim=16)),
    "Gemma 3": (CAUSAL, lambda: tf.Gemma3TextConfig(**GROUPED, head_dim=16)),
    "OPT": (CAUSAL, lambda: tf.OPTConfig(**WIDTH, ffn_dim=128, word_embed_proj_dim=64, init_std=0.1)),
    "GPT-2": (CAUSAL, lambda: tf.GPT2Config(**WIDTH, n_inner=128)),
    "Phi": (CAUSAL, lambda: tf.PhiConfig(**GROUPED)),
    "Phi 3": (CAUSAL, lambda: tf.Phi3Config(**GROUPED)),
    "GLM 4": (CAUSAL, lambda: tf.Glm4Config(**GROUPED, head_dim=16)),
    "OLMo 2": (CAUSAL, lambda: tf.Olmo2Config(**GROUPED)),
    "Granite": (CAUSAL, lambda: tf.GraniteConfig(**GROUPED)),
    "Cohere": (CAUSAL, lambda: tf.CohereConfig(**GROUPED)),
    "Falcon": (CAUSAL, lambda: tf.FalconConfig(**WIDTH, ffn_hidden_size=128)),
    "Mixtral (experts)": (CAUSAL, lambda: tf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "Qwen3 MoE (experts)": (CAUSAL, lambda: tf.Qwen3MoeConfig(**GROUPED | EXPERTS)),
    "GPT-OSS (experts)": (
        CAUSAL, lambda: tf.GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    ),
    "DeepSeek-V3 (experts)": (
        CAUSAL, lambda: tf.DeepseekV3Config(
            **GROUPED | LATENT, moe_intermediate_size=64, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, first_k_dense_replace=1,
        ),
    ),
    "Llama 4 (experts)": (
        CAUSAL, lambda: tf.Llama4TextConfig(**GROUPED, num_local_experts=4, intermediate_size_mlp=128, head_dim=16),
    ),
    "Mamba (state space)": (CAUSAL, lambda: tf.MambaConfig(**WIDTH, state_size=8)),
    "LFM2 (hybrid)": (CAUSAL, lambda: tf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"])),
    "Qwen3.5 (hybrid)": (CAUSAL, lambda: tf.Qwen3_5TextConfig(**GROUPED | DELTA, layer_types=HYBRID)),
    "Falcon-H1 (hybrid)": (
        CAUSAL, lambda: tf.FalconH1Config(**GROUPED, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8),
    ),
    "Llama classifier": (CLASSIFY, lambda: tf.LlamaConfig(**GROUPED)),
    "BERT classifier": (CLASSIFY, lambda: tf.BertConfig(**WIDTH, intermediate_size=128)),
    "RoBERTa classifier": (CLASSIFY, lambda: tf.RobertaConfig(**WIDTH, intermediate_size=128)),
    "T5 (encoder-decoder)": (
        tf.AutoModelForSeq2SeqLM,
        lambda: tf.T5Config(
            vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, pad_token_id=0,
            decoder_start_token_id=0,
        ),
    ),
    "ViT (images)": (
        tf.AutoModelForImageClassification,
        lambda: tf.ViTConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=16,
            patch_size=4, num_labels=2, initializer_range=0.1,
        ),
    ),
}  # fmt: skip


def problem(name: str) -> tuple[Any, Callable[[], Tensor]]:
    """A tiny model and its own loss on a batch of noise."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind.from_config(config(), dtype=torch.float32).eval()
    if kind is tf.AutoModelForImageClassification:
        inputs: dict[str, Any] = {"pixel_values": torch.randn(BATCH, 3, 16, 16)}
    else:
        inputs = {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH))}
    classes = kind in (CLASSIFY, tf.AutoModelForImageClassification)
    inputs |= {"labels": torch.arange(BATCH) % 2 if classes else inputs["input_ids"]}
    inputs |= {"use_cache": False} if kind is CAUSAL else {}
    return model, lambda: model(**inputs).loss


def measure(name: str, estimates: int = ESTIMATES) -> dict[str, Any]:
    """The row of the table for the model `name`."""
    model, loss = problem(name)
    whole = sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for m in find_linear_maps(model, experts=True) if m.weight is not None)

    agzo = align(model, [loss], {"agzo": AGZO}, estimates)["agzo"].summary()
    row = {"model": name, "parameters": whole, "linear": linear / whole, "caught": agzo["capture"] ** 2}
    row |= {"agzo": agzo["cosine_mean"], "error": agzo["cosine_sem"], "predicted": agzo["predicted_cosine"]}
    try:
        guided = align(model, [loss], {"guided": Guided}, 1)["guided"].summary()
    except NoStream as error:
        return row | {"guided": None, "why": str(error)}
    return row | {"guided": guided["cosine_mean"]}


def main() -> None:
    rows = []
    for name in MODELS:
        rows.append(measure(name))
        print(rows[-1], flush=True)
    folder = Path(__file__).parent / "results"
    write_json(folder / "architectures.json", {"estimates": ESTIMATES, "rows": rows})
    lines = [
        "| model | in linear maps | energy caught | agzo's cosine | predicted | guided's cosine |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        guided = "–" if row["guided"] is None else f"{row['guided']:.2f}"
        lines.append(
            f"| {row['model']} | {row['linear']:.0%} | {row['caught']:.0%} | {row['agzo']:.4f} ± {row['error']:.4f} | "
            f"{row['predicted']:.4f} | {guided} |"
        )
    write_text(folder / "architectures.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
