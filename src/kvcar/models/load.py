"""Loading a causal language model by alias, folder, GGUF file or hub id."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

from ..errors import InputError
from ..progress import OnProgress, silent
from .checkpoints import load_gguf, quiet_transformers
from .demo import ALIAS, demo_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, its tokenizer, and the name it was asked for by."""

    model: Any  # a PreTrainedModel that generates; transformers' annotations do not admit the two at once
    tokenizer: Any
    name: str


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    on_step: OnProgress = silent,
) -> LoadedModel:
    """Load a model for inference.

    Args:
        name: ``demo``, a local folder, a ``.gguf`` file, or a hub id, optionally with ``@revision``.
        dtype: float32, bfloat16 or float16; auto is float32 on a CPU and the checkpoint's own elsewhere.
        device: as torch names it; auto takes a GPU where there is one.
        on_step: called with how the demo model's download and conversion go.

    Raises:
        InputError: there is no such model, it cannot be reached or read, or an option is not known.
    """
    where = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    wanted = DTYPES.get(dtype, torch.float32 if where.type == "cpu" else None)
    if name == ALIAS:
        model, tokenizer = _from_transformers(str(demo_folder(on_step)), None, wanted)
    elif name.endswith(".gguf"):
        if not Path(name).is_file():
            raise InputError(f"there is no file {name}")
        model, tokenizer = load_gguf(Path(name), wanted or torch.float16)
    else:
        model, tokenizer = _from_folder_or_hub(name, wanted)
    # `nn.Module.to`, whose types transformers' override hides.
    torch.nn.Module.to(model, where)
    return LoadedModel(model.eval(), tokenizer, name)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return where


def _from_folder_or_hub(name: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{name} is a folder without a config.json, so it is no model transformers can load")
        return _from_transformers(name, None, dtype)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise InputError(f"there is no folder {name}")
    repository, _, revision = name.partition("@")
    return _from_transformers(repository, revision or None, dtype)


def _from_transformers(name: str, revision: str | None, dtype: torch.dtype | None) -> tuple[Any, Any]:
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _cannot_load(name, error) from None
    return model, tokenizer


def load_config(name: str, on_step: OnProgress = silent) -> PreTrainedConfig:
    """A model's config without its weights; raises as ``load_model`` does."""
    if name == ALIAS:
        name = str(demo_folder(on_step))
    options: dict[str, Any] = {}
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise InputError(f"there is no file {name}")
        options["gguf_file"], name = Path(name).name, str(Path(name).parent)
    elif not Path(name).is_dir():
        name, _, revision = name.partition("@")
        options |= {"revision": revision} if revision else {}
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise _cannot_load(name, error) from None


def _cannot_load(name: str, error: Exception) -> InputError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"cannot load the model {name!r}: {first} (a hub id needs the network, and a login where it is gated; a "
        "local model is a folder with config.json; 'demo' is the built-in one)"
    )
