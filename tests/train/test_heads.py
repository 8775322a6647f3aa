"""Models that are no causal language models: their adapters load with PEFT, and hold the heads that came at random."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    T5Config,
    TrainingArguments,
)

import zoft
from optim.models import GROUPED, SIZES, VOCABULARY, snapshot, token_batch
from zoft.errors import UserError
from zoft.train.adapter import save_adapter
from zoft.train.heads import load_heads, save_heads

SEQUENCES, TOKENS, ANSWERS = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(**SIZES),
    "bert": BertConfig(**SIZES, intermediate_size=48),
    "roberta": RobertaConfig(**SIZES, intermediate_size=48),
    "t5": T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
}


def build(kind: Any, name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return kind.from_config(CONFIGS[name]).eval()


def output(model: Any) -> Tensor:
    batch = token_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["input_ids"]
    found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found.start_logits


CASES = [(kind, name) for name in ("llama", "gpt2", "bert", "roberta") for kind in (SEQUENCES, TOKENS, ANSWERS)]
CASES += [(AutoModelForMaskedLM, "bert"), (AutoModelForMaskedLM, "roberta"), (AutoModelForSeq2SeqLM, "t5")]


@pytest.mark.parametrize("kind, name", CASES)
def test_the_adapter_loads_beside_the_pretrained_model(kind: Any, name: str, tmp_path: Path) -> None:
    """Once PEFT took every model for a causal one, and the new head was lost."""
    model, other = build(kind, name, 0), build(kind, name, 1)
    optimizer = zoft.ZOAct(model, lr=0.05, eps=1e-2, rank=4)
    before = output(model)
    for _ in range(3):
        optimizer.step(lambda: output(model).square().mean())
    save_adapter(optimizer, tmp_path)
    whole = kind in (AutoModelForMaskedLM, AutoModelForSeq2SeqLM)  # such a head is part of what is pretrained
    trained, fresh = (model, other) if whole else (model.base_model, other.base_model)
    fresh.load_state_dict(trained.state_dict())
    loaded = PeftModel.from_pretrained(other, tmp_path).eval()
    with torch.no_grad():
        learned = output(model)
        torch.testing.assert_close(output(loaded), learned)
        assert not torch.allclose(learned, before)


def test_a_head_alone_is_no_adapter(tmp_path: Path) -> None:
    model = build(SEQUENCES, "bert", 0)
    optimizer = zoft.ZOAct(model, include=("classifier",))
    optimizer.step(lambda: output(model).square().mean())
    with pytest.raises(UserError, match="only the head has learned"):
        save_adapter(optimizer, tmp_path)


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    """Once what did not fit was left out without a word."""
    save_heads(build(SEQUENCES, "bert", 0), tmp_path)
    with pytest.raises(RuntimeError, match=r"dense.weight"):
        load_heads(build(SEQUENCES, "roberta", 0), tmp_path)


def rows(count: int) -> list[dict[str, Any]]:
    batch = token_batch(count)
    return [{"input_ids": ids, "labels": torch.tensor(i % 3)} for i, ids in enumerate(batch["input_ids"])]


@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_a_resumed_run_has_the_head_that_it_began_with(
    name: str, arguments: Callable[..., TrainingArguments], tmp_path: Path
) -> None:
    """Even if the model was made with another: then the head would not fit what lies beside it."""

    def run(folder: str, seed: int, steps: int, **options: Any) -> zoft.ZOTrainer:
        CONFIGS[name].num_labels = 3
        pretrained, model = build(SEQUENCES, name, 0).base_model, build(SEQUENCES, name, seed)
        model.base_model.load_state_dict(pretrained.state_dict())
        out = str(tmp_path / folder)
        args = arguments(output_dir=out, max_steps=steps, save_steps=2, lr_scheduler_type="constant")
        optimizer = zoft.Guided(model, lr=1e-2, attention=True)
        trainer = zoft.ZOTrainer(model, args, train_dataset=rows(16), optimizers=(optimizer, None))
        trainer.train(**options)
        return trainer

    whole = run("whole", 1, 4)
    run("parts", 1, 2)
    resumed = run("parts", 2, 4, resume_from_checkpoint=True)
    assert whole.zero_order is not None and resumed.zero_order is not None
    expected, found = snapshot(whole.model), snapshot(resumed.model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    heads = {key for key in whole.zero_order.coefficients if key.startswith(("score", "classifier"))}
    assert heads
    for key, factor in whole.zero_order.coefficients.items():
        assert torch.equal(factor, resumed.zero_order.coefficients[key])
