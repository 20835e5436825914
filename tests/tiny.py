"""Tiny random models of every family that must work, seeded and built in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 128
POSITIONS = 512

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    # Wide enough for attention to prefer some tokens, as a trained model does.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _gpt2(**overrides: Any) -> PreTrainedConfig:
    own = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": POSITIONS, "vocab_size": VOCABULARY}
    own |= {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return GPT2Config(**(own | overrides))


def _llama(**overrides: Any) -> PreTrainedConfig:
    return LlamaConfig(**(_COMMON | overrides))


def _mistral(**overrides: Any) -> PreTrainedConfig:
    return MistralConfig(**(_COMMON | {"sliding_window": None} | overrides))


def _qwen2(**overrides: Any) -> PreTrainedConfig:
    own = {k: v for k, v in _COMMON.items() if k != "head_dim"}
    return Qwen2Config(**(own | overrides))


def _qwen3(**overrides: Any) -> PreTrainedConfig:
    return Qwen3Config(**(_COMMON | {"head_dim": 32} | overrides))


def _gemma3(**overrides: Any) -> PreTrainedConfig:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    own = {"layer_types": kinds, "sliding_window": 32, "query_pre_attn_scalar": 16}
    return Gemma3TextConfig(**(_COMMON | own | overrides))


FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
}


def tiny_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model of a family, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**overrides), attn_implementation="sdpa")
    return model.to(dtype).eval()


def token_ids(count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids int64 ``[batch, count]``, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, count), generator=generator)
