"""Names of models: folders, runs, adapters, .gguf files, and what of them cannot be loaded."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import zoft
from zoft.errors import UserError
from zoft.train import load_model
from zoft.train.adapter import save_adapter
from zoft.train.models import LENGTH, resolve, room

from .tiny import TOKENIZER, make_model


def save(folder: Path) -> Path:
    make_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A llama of one block with random weights; returns these by their names in the file."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output": (len(tokens), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32),
        "blk.0.ffn_down": (32, 48),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_folder_and_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "run" / "model")
    assert resolve(str(folder)) == resolve(str(tmp_path / "run")) == str(folder)
    model, tokenizer = load_model(str(tmp_path / "run"), device="cpu")
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer.padding_side == "left"
    assert load_model(str(folder), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


def test_hub_id_is_left_to_the_hub() -> None:
    assert resolve("owner/name") == "owner/name"


def test_adapter_finds_its_base_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model, _ = load_model("base", device="cpu")
    optimizer = zoft.ZOAct(model, lr=1e-2)
    ids = TOKENIZER("a fine film", return_tensors="pt").input_ids
    optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    save_adapter(optimizer, tmp_path / "run" / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded, _ = load_model(str(tmp_path / "run"), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_has_its_own_tokenizer(tmp_path: Path) -> None:
    """Once the base model's was taken, and with it another chat template than the adapter was trained with."""
    base = save(tmp_path / "base")
    model, tokenizer = load_model(str(base), device="cpu")
    optimizer = zoft.ZOAct(model, lr=1e-2)
    optimizer.step(
        lambda: model(**tokenizer("a fine film", return_tensors="pt", return_token_type_ids=False)).logits.mean()
    )
    save_adapter(optimizer, tmp_path / "adapter")
    assert load_model(str(tmp_path / "adapter"), device="cpu")[1].chat_template is None
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert load_model(str(tmp_path / "adapter"), device="cpu")[1].chat_template == "{{ messages }}"


def test_adapter_needs_coefficients(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no coefficients"):
        save_adapter(zoft.ZOAct(make_model(), lr=1e-2), tmp_path)


def test_missing_weights(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .* model.layers.1.mlp.up_proj.weight"):
        load_model(str(folder))


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOFT_CACHE", str(tmp_path / "cache"))
    written = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert model.dtype == torch.bfloat16 and tokenizer.eos_token_id == 2
    expected = written["blk.0.ffn_down"].bfloat16()
    assert torch.equal(model.get_parameter("model.layers.0.mlp.down_proj.weight"), expected)

    [folder] = (tmp_path / "cache" / "gguf").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert resolve(str(tmp_path / "tiny.gguf")) == str(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_damaged_gguf(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOFT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"cannot convert .*tiny\.gguf"):
        resolve(str(file))
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZOFT_CACHE", str(tmp_path / "file"))
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match="cannot convert"):
        resolve(str(tmp_path / "tiny.gguf"))


def test_demo_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoft.train.models.DEMO_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install"):
        resolve("demo")


def test_room() -> None:
    from zoft.data import custom_task, load_task

    model = make_model()  # 256 positions
    assert room(model, load_task("sst2")) == 256
    assert room(model, load_task("squad")) == 206
    assert room(model, load_task("squad"), 100) == 100
    with pytest.raises(UserError, match="256"):
        room(model, load_task("squad"), 207)
    with pytest.raises(UserError, match="256"):
        room(model, load_task("gsm8k"))
    assert room(model, custom_task()) == 256, "answers like the rows' own need no more than these"
    model.config.max_position_embeddings = 4 * LENGTH
    longer = replace(load_task("squad"), max_new_tokens=LENGTH)
    assert room(model, longer) == LENGTH, "once there was said to be no room"
    assert room(model, replace(longer, max_new_tokens=4 * LENGTH - 1)) == 1
    with pytest.raises(UserError, match="8192 tokens with the 8192 generated"):
        room(model, replace(longer, max_new_tokens=4 * LENGTH))


def test_a_model_without_an_end_has_room() -> None:
    from zoft.data import load_task

    model = make_model()
    model.config.max_position_embeddings = -1  # as XLNet's is
    assert room(model, load_task("sst2")) == LENGTH
    assert room(model, load_task("sst2"), 10 * LENGTH) == 10 * LENGTH
