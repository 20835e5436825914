"""Loading a causal language model by alias, folder, GGUF file or hub id."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

from ..errors import InputError, require
from ..progress import OnProgress, silent
from .checkpoints import load_gguf, quiet_transformers
from .demo import ALIAS, demo_folder

_LONGEST_REASON = 300
_log = logging.getLogger("kvcar")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, its tokenizer, and the name it was asked for by."""

    model: Any  # a PreTrainedModel that generates; transformers' annotations do not admit the two at once
    tokenizer: Any
    name: str


def load_model(
    name: str | Path,
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
    require(str, Path, name=name)
    require(str, dtype=dtype)
    name, where = str(name), _device(device)
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
    config = _read(name, "config", AutoConfig.from_pretrained, options)
    tokenizer = _read(name, "tokenizer", AutoTokenizer.from_pretrained, options)
    options |= {"dtype": dtype or "auto", "output_loading_info": True}
    model, info = _read(name, "model", AutoModelForCausalLM.from_pretrained, options, config)
    _check_weights(name, info)
    return model, tokenizer


def _read(name: str, what: str, read: Callable[..., Any], options: dict[str, Any], config: Any = None) -> Any:
    """Let transformers read a part of a checkpoint; a damaged one makes it fail in any way it likes.

    Raises:
        InputError: with what it said, as one line.
    """
    try:
        with quiet_transformers():
            return read(name, **options)
    except Exception as error:
        raise _cannot_load(name, what, error, _quantized_by(config)) from None


def _check_weights(name: str, info: Mapping[str, Any]) -> None:
    """Refuse weights that transformers would make up; warn of those that it leaves out."""
    missing = sorted(map(str, info.get("missing_keys") or ()))
    wrong = [f"{each[0]} has shape {list(each[1])}" for each in info.get("mismatched_keys") or ()]
    if missing or wrong:
        first = f"{wrong[0]} there" if wrong else f"{missing[0]} is missing"
        raise InputError(
            f"the weights of {name!r} are not those of its config: {first} (of {len(missing) + len(wrong)}); copy weights and "
            "config.json from the same checkpoint"
        )
    unexpected = sorted(map(str, info.get("unexpected_keys") or ()))
    if unexpected:
        _log.warning(
            "%s has weights that its config has no place for: %s (of %d)", name, unexpected[0], len(unexpected)
        )


def _quantized_by(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


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
    return _read(name, "config", AutoConfig.from_pretrained, options)


def _cannot_load(name: str, what: str, error: Exception, quantized_by: str | None) -> InputError:
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= _LONGEST_REASON else said[:_LONGEST_REASON].rsplit(" ", 1)[0] + " ..."
    if quantized_by is not None:
        hint = (
            f"its weights are quantised by {quantized_by}: install what that needs, or take the checkpoint without it"
        )
    elif Path(name).is_dir():
        hint = "a model's folder holds config.json, the weights and a tokenizer, as save_pretrained writes them"
    else:
        hint = (
            "a hub id needs the network, and a login where it is gated; a local model is a folder with config.json; "
            "'demo' is the built-in one"
        )
    return InputError(f"cannot load the model {name!r}, its {what}: {said} ({hint})")
