"""What weights, loops and architectures zoft works with: the README's section about it, made anew.

    python benchmarks/supported.py

Weights: a tiny random Llama in each format, loaded as a user loads it, is trained by each method for a few steps; the
cell says what moved while its loss fell, or that the method refused. Loops: the scripts of examples/, all of which the
tests run. Architectures: results/architectures.json. The tests make the section too, and compare it with the README.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers as tf
from torch import Tensor

from zoft.optim import AGZO, LOZO, Guided, MeZO, ZeroOrder, ZOAct, cross_entropy
from zoft.optim.layers import find_linear_maps
from zoft.train import load_model
from zoft.train.files import write_text

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- made by benchmarks/supported.py -->\n", "<!-- until here -->\n"
STEPS, FALL = 30, 0.9  # of a training, and the fraction of its first loss that it has to come below
METHODS: dict[str, Callable[[Any], ZeroOrder]] = {
    "mezo": partial(MeZO, lr=1e-2, eps=1e-2, shape="zscore"),  # shaped: one lr for all formats
    "lozo": partial(LOZO, lr=1e-2, eps=1e-2, shape="zscore"),
    "agzo": partial(AGZO, lr=3e-2, eps=1e-2, two_sided=True, shape="zscore"),
    "zo-act": partial(ZOAct, lr=3e-2, eps=1e-2, rank=4),
    "guided": partial(Guided, lr=1e-2),
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "a .gguf file, converted to bfloat16": {},
    "8 bits, torchao (`--dtype int8`)": {"dtype": "int8"},
    "4 bits, bitsandbytes (`--dtype nf4`)": {"dtype": "nf4"},
    "8 bits, bitsandbytes, saved so": {"saved": tf.BitsAndBytesConfig(load_in_8bit=True)},
}


def tiny_gguf(file: Path) -> Path:
    """A random Llama of two blocks with a tokenizer of bytes, in float32."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in tf.LlamaForCausalLM(config).state_dict().items():
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def load(file: Path, dtype: str = "auto", saved: Any = None) -> Any:
    """The model of `file` in one of the formats of `WEIGHTS`."""
    if saved is None:
        return load_model(str(file), dtype=dtype, device="cpu")[0]
    plain, tokenizer = load_model(str(file), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(f"{folder}/plain")
        tf.AutoModelForCausalLM.from_pretrained(f"{folder}/plain", quantization_config=saved).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load_model(folder, device="cpu")[0]


def moved(model: Any, method: Callable[[Any], ZeroOrder]) -> str:
    """What `method` trains in `model`: weights, an adapter, or the rest, if the linear layers stay as they are.

    A dash, if it refuses; a question mark, if it trains and the loss does not fall.
    """
    ids = torch.arange(3, 67).view(4, 16)

    def closure() -> Any:
        return cross_entropy(model(input_ids=ids, use_cache=False).logits, torch.full_like(ids, 7))

    def loss() -> float:
        with torch.no_grad():
            return float(closure().values)

    try:
        optimizer = method(model)
    except ValueError:
        return "–"
    layers = [m.weight for m in find_linear_maps(model.model.layers) if m.weight is not None]
    before: list[Tensor] = [weight.detach().clone() for weight in layers]
    start = loss()
    for _ in range(STEPS):
        optimizer.step(closure)
    if not loss() < FALL * start:
        return "?"
    if optimizer.keeps_coefficients:
        return "adapter"
    written = layers and not any(torch.equal(new, old) for new, old in zip(layers, before, strict=True))
    return "weights" if written else "the rest"


def weights(file: Path) -> list[str]:
    """The rows of the table of formats and methods."""
    rows = [["weights", *METHODS], ["---"] * (1 + len(METHODS))]
    for name, given in WEIGHTS.items():
        rows.append([name, *(moved(load(file, **given), method) for method in METHODS.values())])
    return [f"| {' | '.join(row)} |" for row in rows]


def loops() -> list[str]:
    """The scripts of examples/, by what they say of themselves."""
    files = sorted((ROOT / "examples").glob("*.py"))
    titles = (file.read_text(encoding="utf-8").partition('"""')[2].partition(": ")[0] for file in files)
    return [f"- [{title}](examples/{file.name})" for title, file in zip(titles, files, strict=True)]


def architectures() -> list[str]:
    """Which of the table of architectures guided knows."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())["rows"]
    guided = ", ".join(row["model"] for row in rows if row["guided"] is not None)
    probes = ", ".join(row["model"] for row in rows if row["guided"] is None)
    survey = json.loads((ROOT / "benchmarks" / "results" / "every_model.json").read_text())
    return [
        f"- by all methods: {guided};",
        f"- by probes: {probes}.",
        "",
        f"Of the {survey['kinds']} kinds of causal language model in transformers {survey['transformers']}, AGZO and "
        f"ZO-Act take a step on all {survey['tried']} that a tiny one",
        f"could be made of, guided on {survey['guided']} ([which](benchmarks/results/every_model.json)).",
    ]


def section(file: Path) -> str:
    """The section, made with the model in `file`."""
    blocks = (
        [
            'What moves where weights like these are trained ("the rest": embeddings, norms and the head, which',
            "`zoft train` refuses; –: refused in Python too):",
        ],
        weights(file),
        ["Loops, each a script of under 40 lines:"],
        loops(),
        ["Architectures ([measured](docs/architectures.md)) are trained"],
        architectures(),
    )
    return "\n" + "".join("\n".join(lines) + "\n\n" for lines in blocks)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ZOFT_CACHE"] = folder
        text = section(tiny_gguf(Path(folder) / "tiny.gguf"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    head, rest = readme.split(BEGIN)
    write_text(ROOT / "README.md", head + BEGIN + text + END + rest.split(END)[1])
    print(text)


if __name__ == "__main__":
    main()
