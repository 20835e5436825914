# pyright: reportMissingImports=false
"""Which backend a CPU's layers get: ``CPU`` is vLLM's own unless the config of the engine under construction names kvcar."""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ...errors import InputError
from .checks import check_version
from .options import NAME, asked_for, options_of


def __getattr__(name: str) -> Any:
    """Find ``CPU``, anew for every engine."""
    if name != "CPU":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = get_current_vllm_config()
    selected = config.attention_config.backend == AttentionBackendEnum.CUSTOM
    if selected != asked_for(config):
        raise InputError(_half_asked_for(config, selected))
    if not selected:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    check_version(options_of(config))
    from .backend import KVCarBackend

    return KVCarBackend


def _half_asked_for(config: Any, selected: bool) -> str:
    """Say which of the two options that kvcar needs is there, and which is to be added."""
    if selected:
        return (
            "--attention-backend CUSTOM takes kvcar's cache, whose bundle is not named: add --additional-config "
            f'\'{{"{NAME}": {{"bundle": "FOLDER or hub id"}}}}\', which is {config.additional_config!r}, or take the backend away'
        )
    backend = config.attention_config.backend
    return (
        f"--additional-config names {NAME}, whose cache is not taken: add --attention-backend CUSTOM, which is "
        f"{'not given' if backend is None else backend.name}, or take {NAME} out of it"
    )
