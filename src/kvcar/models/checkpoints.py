"""Reading checkpoints through transformers: quietly, and GGUF files dequantised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..errors import InputError


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only, and no bars, while it lasts; the user's own settings come back afterwards."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        # Some bars (GGUF conversion) heed no setting; errors come as exceptions, so nothing is lost.
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


def check_gguf_readers() -> None:
    """Refuse at once where transformers could not read a GGUF file; raises InputError."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"GGUF files need {' and '.join(missing)}; install what is missing with: pip install 'kvcar[demo]'"
        )


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file.

    Raises:
        InputError: the file is no GGUF, of an architecture that transformers cannot read from one, or the extra ``demo``
            is not installed.
    """
    check_gguf_readers()
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
