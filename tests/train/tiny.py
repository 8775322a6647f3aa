"""A small tokenizer, tiny random models of several families that use it, and rows to train on."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from optim.models import GROUPED, SIZES, build

CORPUS = [
    "a dull film It was terrible",
    "a fine film It was great",
    "Title: Tea\nContext: the cat drinks green tea at home\nQuestion: what does it drink?\nAnswer: green tea",
]


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows the words of CORPUS, and any text by its bytes.

    With `bos`, texts begin with a token of their own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>" if bos else None
    )


TOKENIZER = make_tokenizer()
_OWN: dict[str, Any] = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256}
_SIZES, _GROUPED = SIZES | _OWN, GROUPED | _OWN

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "pangu": LlamaConfig(**_GROUPED, attention_bias=True),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True),
    "opt": OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32, init_std=0.1),
    "gpt2": GPT2Config(**_SIZES, n_inner=48),
    "gemma3": Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8),
}


def make_model(family: str = "llama") -> PreTrainedModel:
    """The same tiny random model each time, float32, in evaluation mode."""
    return build(FAMILIES[family])


def reviews(count: int) -> list[dict[str, Any]]:
    """Rows of sst2: a fine film is great, a dull one terrible; texts of differing lengths."""
    sentences = [f"a {'very ' * (i % 5)}{('dull', 'fine')[i % 2]} film about the number {i}" for i in range(count)]
    return [{"sentence": sentence, "label": i % 2} for i, sentence in enumerate(sentences)]


def questions(count: int) -> list[dict[str, Any]]:
    """Rows of squad."""
    drinks = ["green tea", "tea", "warm milk"]
    return [
        {
            "title": "Tea",
            "context": f"the cat {'often ' * (i % 4)}drinks {drinks[i % 3]} at home",
            "question": "what does it drink?",
            "answers": {"text": [drinks[i % 3]]},
        }
        for i in range(count)
    ]
