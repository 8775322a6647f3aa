"""Settings of all tests, and a fixture of a tiny model."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

torch.set_num_threads(1)


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """A random Llama of two layers, hidden size 32, 64 words, untied, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        return LlamaForCausalLM(config).eval()
