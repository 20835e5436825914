"""Which implementation of the kernels runs: chosen once for a device, said in the log, never changed in silence.

``KVCAR_KERNELS`` overrides the choice:

- ``cpu``: compiled C where it serves (decode steps), PyTorch elsewhere. The default on CPUs with a C compiler.
- ``triton``: Triton where it serves, PyTorch elsewhere. The default on GPUs where Triton is installed.
- ``torch``: PyTorch alone, on any device.
- ``naive``: the specification, slow.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Literal, get_args

import torch

from ..errors import InputError, KernelError
from .native import find_compiler

Backend = Literal["naive", "torch", "cpu", "triton"]
VARIABLE = "KVCAR_KERNELS"
_log = logging.getLogger("kvcar.kernels")


def backend_for(device: torch.device) -> Backend:
    """The backend for tensors on ``device``.

    Raises:
        InputError: ``KVCAR_KERNELS`` names no backend.
        KernelError: it names one that cannot run here.
    """
    return _backend(os.environ.get(VARIABLE, ""), device.type, os.environ.get("TRITON_INTERPRET", ""))


def tell_once(operation: str, backend: Backend, reason: str) -> None:
    """Log, once for each, that ``operation`` runs in PyTorch because ``backend`` does not serve it."""
    _tell(operation, backend, reason)


@cache
def _tell(operation: str, backend: Backend, reason: str) -> None:
    _log.info("%s: PyTorch, as the %s kernel does not serve this: %s", operation, backend, reason)


@cache
def _backend(given: str, device: str, interpreted: str) -> Backend:
    if given:
        for name in get_args(Backend):
            if name == given:
                _refuse_missing(name, device, interpreted)
                _log.info("kernels on %s: %s, from %s", device, name, VARIABLE)
                return name
        raise InputError(f"{VARIABLE} must be one of {', '.join(get_args(Backend))}, got {given!r}")
    name, why = _default(device)
    # What costs speed is worth a warning.
    _log.log(logging.WARNING if name == "torch" else logging.INFO, "kernels on %s: %s, %s", device, name, why)
    return name


def _default(device: str) -> tuple[Backend, str]:
    if device == "cpu":
        compiler = find_compiler()
        if compiler is None:
            return "torch", "as no C compiler was found (cc, gcc, clang or CC); decoding is several times slower so"
        return "cpu", f"compiled by {compiler.version}"
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch", "as Triton is not installed; pip install 'kvcar[triton]' for faster decoding"
        return "triton", "as Triton is installed"
    return "torch", "which runs on any device"


def _refuse_missing(name: Backend, device: str, interpreted: str) -> None:
    if name == "cpu" and device != "cpu":
        raise KernelError(f"{VARIABLE}=cpu, but the model is on {device}; unset it, or take torch or triton")
    if name != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise KernelError(f"{VARIABLE}=triton, but Triton is not installed; pip install 'kvcar[triton]'")
    if device == "cpu" and interpreted != "1":
        raise KernelError(
            f"{VARIABLE}=triton runs on a CPU in Triton's interpreter only: set TRITON_INTERPRET=1 too (slow; for tests)"
        )
