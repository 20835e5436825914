"""What Triton's compiler made of the kernels that ran: registers, what they spill, shared memory."""

from __future__ import annotations

from typing import Any

from triton.runtime.jit import JITFunction

from kvcar.kernels.attend import triton as attend_backend
from kvcar.kernels.attend import triton_paged
from kvcar.kernels.encode import triton as encode_backend

_MODULES = (attend_backend, triton_paged, encode_backend)


def compiled_kernels() -> list[dict[str, Any]]:
    """Describe every variant that this process compiled; none under the interpreter, which compiles nothing."""
    kernels = {
        name: kernel for module in _MODULES for name, kernel in vars(module).items() if isinstance(kernel, JITFunction)
    }
    return [_described(name, made) for name, kernel in sorted(kernels.items()) for made in _variants(kernel)]


def _variants(kernel: JITFunction[Any]) -> list[Any]:
    """The compiled kernels of all devices, wherever this release of Triton keeps them."""
    caches = getattr(kernel, "device_caches", None) or {}
    return [made for held in caches.values() for made in (held[0] if isinstance(held, tuple) else held).values()]


def _described(name: str, made: Any) -> dict[str, Any]:
    metadata = getattr(made, "metadata", None)
    return {
        "kernel": name,
        "registers": getattr(made, "n_regs", None),
        "spilled": getattr(made, "n_spills", None),
        "shared_bytes": getattr(metadata, "shared", None),
        "warps": getattr(metadata, "num_warps", None),
    }
