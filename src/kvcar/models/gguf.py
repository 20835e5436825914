"""Loading GGUF files through transformers, dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import InputError
from .quiet import quiet_transformers


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file.

    Raises:
        InputError: the file is no GGUF, or of an architecture that transformers cannot read from one.
    """
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # a damaged file makes the reader fail in any way it likes
        raise InputError(f"transformers cannot load {path} as GGUF: {error}") from None
    # The weights are plain now; leftovers of the quantiser would make transformers refuse to save them.
    model.__dict__.pop("hf_quantizer", None)
    model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer
