"""Small models with experts that share a parameter."""

from collections.abc import Callable
from typing import Any

from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from .models import GROUPED, build

ROUTED: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT: dict[str, Any] = {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
CONFIGS: dict[str, Callable[..., Any]] = {
    "Mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "Qwen3 MoE": lambda: Qwen3MoeConfig(**GROUPED, **ROUTED, num_experts=4, head_dim=8, decoder_sparse_step=1),
    "GPT-OSS": lambda: GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "DeepSeek-V3": lambda: DeepseekV3Config(
        **{**GROUPED, **ROUTED, **LATENT, "num_key_value_heads": 4},
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=None,
    ),
}


def model_of(name: str, way: str = "grouped_mm") -> PreTrainedModel:
    config = CONFIGS[name]()
    config._experts_implementation = way
    return build(config)
