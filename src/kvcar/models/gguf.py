"""Loading GGUF files through transformers, dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import InputError
from .quiet import quiet_transformers


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a GGUF file.

    Raises:
        InputError: the file is no GGUF, or of an architecture that transformers cannot read from one.
    """
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"transformers cannot load {path} as GGUF: {error}") from None
    # The weights are plain now; leftovers of the quantiser would make transformers refuse to save them.
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
