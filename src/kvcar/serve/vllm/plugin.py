# pyright: reportMissingImports=false
"""What vLLM calls when it starts (entry point ``vllm.general_plugins``): names our backend, and changes nothing else."""

from __future__ import annotations

_HERE = "kvcar.serve.vllm"


def register() -> None:
    """Register the backend, in every process of vLLM; doing it twice is harmless.

    On CPUs vLLM takes its own backend whatever is selected, so that one is replaced by ``chosen.CPU``, which is vLLM's own
    unless the config names kvcar.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, f"{_HERE}.backend.KVCarBackend")
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{_HERE}.chosen.CPU")
