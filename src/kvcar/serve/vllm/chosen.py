# pyright: reportMissingImports=false
"""Which backend a CPU's layers get: ``CPU`` is vLLM's own unless the config of the engine under construction names kvcar."""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ...errors import InputError
from .checks import check_version
from .options import asked_for, options_of


def __getattr__(name: str) -> Any:
    """Find ``CPU``, anew for every engine."""
    if name != "CPU":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = get_current_vllm_config()
    selected = config.attention_config.backend == AttentionBackendEnum.CUSTOM
    if selected != asked_for(config):
        raise InputError(
            'kvcar needs both --attention-backend CUSTOM and --additional-config \'{"kvcar": {"bundle": ...}}\'; only '
            f"the {'first' if selected else 'second'} was given"
        )
    if not selected:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    check_version(options_of(config))
    from .backend import KVCarBackend

    return KVCarBackend
