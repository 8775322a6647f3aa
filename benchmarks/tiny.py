"""A tiny random model and rows for it: what the benchmarks of reliability train."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["a dull film It was terrible", "a fine film It was great"]


def make_model(folder: Path) -> Path:
    """Save a Llama of two layers, float32, and its tokenizer into `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return folder


def make_rows(folder: Path) -> Path:
    """Write rows of sst2 into `folder`: 60 to train on, 40 to validate on."""
    folder.mkdir(parents=True)
    for name, count in (("train", 60), ("validation", 40)):
        texts = [f"a {'very ' * (i % 5)}{('dull', 'fine')[i % 2]} film about the number {i}" for i in range(count)]
        rows = [json.dumps({"sentence": text, "label": i % 2}) + "\n" for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder
