"""Every kind of causal language model that transformers has, tiny: does a step of each method work?

    python benchmarks/every_model.py [KIND ...]

A step of AGZO, of ZO-Act and of guided on each, with random weights: probes have to leave the weights as they were, and
the step the loss finite. What ZO-Act and guided have learned, saved and loaded with PEFT on the model as it was, has to
compute the same ("loads"). For guided, in how many blocks of how many something was found that writes into the stream,
and how many of these writers end a feed-forward part or attention that it knows. Kinds of which no tiny configuration
could be made are listed with the reason. Writes results/every_model.json, unless kinds are named.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from zoft.optim import AGZO, Guided, Loss, NoStream, ZeroOrder, ZOAct, cross_entropy
from zoft.optim.methods.zoact import HEADS
from zoft.train.adapter import not_loaded, save_adapter
from zoft.train.files import write_json

LARGEST = 100_000_000  # parameters
LR = 0.03  # of coefficients: to be seen beside rounding
# Whatever of these a configuration has.
SIZES: list[tuple[Any, str]] = [
    (
        32,
        "hidden_size n_embd d_model word_embed_proj_dim moe_intermediate_size shared_expert_intermediate_size "
        "attention_hidden_size emb_dim lru_width expert_ffn_hidden_size",
    ),
    (48, "intermediate_size n_inner ffn_dim ffn_hidden_size decoder_ffn_dim"),
    (
        4,
        "num_attention_heads n_head n_heads decoder_attention_heads num_experts num_local_experts n_routed_experts "
        "mamba_n_heads linear_num_value_heads",
    ),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_key_value_heads num_kv_heads "
        "num_experts_per_tok linear_num_key_heads mamba_expand eos_token_id",
    ),
    (
        8,
        "head_dim kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state "
        "rotary_dim linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input",
    ),
    (1, "n_group topk_group n_shared_experts first_k_dense_replace bos_token_id"),
    (16, "mamba_d_head mamba_headdim"),
    (64, "vocab_size n_words vocab_size_per_layer_input mamba_d_ssm"),
    (128, "max_position_embeddings n_positions"),
    (0, "pad_token_id"),
    (0.0, "attention_dropout hidden_dropout"),
    (True, "is_decoder"),
]
VALUES: dict[str, Any] = {name: value for value, names in SIZES for name in names.split()}
LATENT: dict[str, Any] = {"num_key_value_heads": 4}
DELTA: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
CONV: dict[str, Any] = {"layer_types": ["conv", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {  # None: what the configuration has itself
    **dict.fromkeys(
        ["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"], LATENT
    ),
    **dict.fromkeys(("minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), DELTA),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), DELTA | LATENT),
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_expand": None},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": CONV | {"num_dense_layers": 1},
    "lfm3": CONV,
    "longcat_flash": LATENT | {"num_layers": 1},
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "mamba_d_head": None},
}


def small(config_of: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Values that make a configuration, and those within it, small."""
    known = set(inspect.signature(config_of.__init__).parameters)
    known |= {name for ancestor in config_of.__mro__ for name in getattr(ancestor, "__annotations__", {})}
    values = {name: value for name, value in VALUES.items() if name in known} | own
    within = {name: kind for name, kind in config_of.sub_configs.items() if hasattr(kind, "sub_configs")}
    values |= {name: small(kind, OWN.get(kind.model_type, {})) for name, kind in within.items()}
    return {name: value for name, value in values.items() if value is not None}


def build(kind: str) -> nn.Module:
    """A tiny model of this kind.

    Raises:
        ValueError: it stays large.
    """
    config = CONFIG_MAPPING[kind](**small(CONFIG_MAPPING[kind], OWN.get(kind, {})))
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    if (count := sum(parameter.numel() for parameter in model.parameters())) > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def measure(kind: str) -> dict[str, Any]:
    """The row of the table for the models of this kind."""
    ids = torch.randint(3, 60, (4, 10))

    def loss(model: nn.Module) -> Loss:
        return cross_entropy(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, ids)

    try:
        model = build(kind)
        with torch.no_grad():
            loss(model)
    except Exception as error:  # whatever a configuration made of guesses may raise
        return {"kind": kind, "left_out": f"{type(error).__name__}: {error}".splitlines()[0]}
    row: dict[str, Any] = {"kind": kind, "agzo": step(AGZO(model, lr=1e-4), loss)}
    for name, method in (("zo-act", ZOAct), ("guided", Guided)):
        optimizer = method(model := build(kind), lr=LR, exclude=(*HEADS, *not_loaded(model)))
        try:
            row[name] = step(optimizer, loss) | {"loads": loads(optimizer, loss, build(kind))}
        except NoStream as error:
            row[name] = {"none": str(error)}
    return row


def step(optimizer: ZeroOrder, loss: Callable[[nn.Module], Loss]) -> dict[str, Any]:
    """One step of `optimizer`: how many of its maps moved, and what guided found."""
    model = optimizer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.estimate(partial(loss, model))
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items()), "weights have moved"
    moved = {"moved": len(optimizer.bases), "maps": len(optimizer.maps)}
    optimizer.step()
    with torch.no_grad():
        assert bool(loss(model).values.isfinite().all()), "the loss is not finite"
    if not isinstance(optimizer, Guided):
        return moved
    stream = optimizer.estimator._stream
    assert stream is not None
    found = {"blocks": len(stream.blocks), "writing": sum(bool(block.writers) for block in stream.blocks)}
    known = {"feed_forward": sum(writer.feed_forward is not None for writer in stream.writers)}
    known |= {"attention": sum(writer.attention is not None for writer in stream.writers)}
    return moved | found | {"writers": len(stream.writers)} | known


@torch.no_grad()
def loads(optimizer: ZeroOrder, loss: Callable[[nn.Module], Loss], fresh: nn.Module) -> bool:
    """Whether the adapter of `optimizer` does to `fresh` what training has done to the optimizer's model."""

    def losses(model: Any) -> Tensor:
        return loss(model.eval()).values

    start, learned = losses(fresh), losses(optimizer.model)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(optimizer, Path(folder))
        found = losses(PeftModel.from_pretrained(fresh, folder))
    assert not learned.equal(start), "nothing was learned"
    return bool((found - learned).norm() <= 0.01 * (learned - start).norm())


def main(kinds: list[str]) -> None:
    rows = []
    for kind in kinds or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        rows.append(measure(kind))
        print(rows[-1], flush=True)
    tried = [row for row in rows if "left_out" not in row]
    guided = [row for row in tried if "none" not in row["guided"]]
    adapters = [row[name]["loads"] for row in tried for name in ("zo-act", "guided") if "loads" in row[name]]
    counts = {"kinds": len(rows), "tried": len(tried), "guided": len(guided)}
    counts |= {"adapters": len(adapters), "loaded": sum(adapters)}
    print(counts)
    if not kinds:
        found = {"transformers": tf.__version__, **counts, "rows": rows}
        write_json(Path(__file__).parent / "results" / "every_model.json", found)


if __name__ == "__main__":
    tf.logging.set_verbosity_error()
    main(sys.argv[1:])
