"""The registry of kernels: which implementations an operation has, and which of them runs.

An implementation registers with its ``Operation`` under the name of a backend, in a file of the operation's folder that
is named after the backend (PyTorch's and the specification's are always imported, the others when they are first asked
for):

- ``naive``: the specification, slow.
- ``torch``: PyTorch alone, on any device; takes whatever another backend has no implementation for.
- ``cpu``: compiled C. The default on CPUs with a C compiler that works.
- ``triton``: Triton. The default on GPUs where Triton is installed.

The device chooses the backend (``backend_for``), ``KVCAR_KERNELS`` overrides it. The choice, and every input that a
kernel does not support, is logged once.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar, get_args

import torch

from ..errors import InputError, KernelError
from .native import find_compiler, native_library

Backend = Literal["naive", "torch", "cpu", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
VARIABLE = "KVCAR_KERNELS"
_log = logging.getLogger("kvcar.kernels")
_Run = TypeVar("_Run", bound=Callable[..., object])


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        run: the function.
        unsupported: says why ``run`` cannot take some inputs, or None if it can; None where it takes all.
    """

    run: Callable[..., torch.Tensor]
    unsupported: Callable[..., str | None] | None


class Operation:
    """An operation on pages and its implementations, by backend and case.

    Args:
        name: for messages.
        package: where its implementations lie, one file each, named after the backend.
        cases: kinds of inputs that backends have implementations of their own for.
    """

    def __init__(self, name: str, package: str, cases: tuple[str, ...] = ("any",)) -> None:
        self.name, self.cases = name, cases
        self.implementations: dict[tuple[Backend, str], Implementation] = {}
        self._package = package
        self._imported: set[Backend] = set()

    def register(
        self, backend: Backend, *cases: str, unsupported: Callable[..., str | None] | None = None
    ) -> Callable[[_Run], _Run]:
        """Return a decorator that registers a function for ``backend`` and ``cases``, for all cases if none is named."""

        def registered(run: _Run) -> _Run:
            own = Implementation(run, unsupported)  # pyright: ignore[reportArgumentType]
            self.implementations |= {(backend, case): own for case in cases or self.cases}
            return run

        return registered

    def find(self, backend: Backend, case: str = "any") -> Implementation | None:
        """Find what ``backend`` has for ``case``, importing it if need be; None if it has nothing."""
        found = self.implementations.get((backend, case))
        if found is None and backend not in self._imported:
            self._import(backend)
            found = self.implementations.get((backend, case))
        return found

    def choose(self, backend: Backend, case: str, *inputs: object) -> Callable[..., torch.Tensor]:
        """Choose the function for ``case``: the backend's, or PyTorch's where it has none or cannot take ``inputs``.

        Args:
            backend: of ``backend_for``.
            case: one of ``cases``.
            inputs: what implementations decide by, as ``unsupported`` takes them.
        """
        own = self.find(backend, case)
        if own is not None:
            reason = None if own.unsupported is None else own.unsupported(*inputs)
            if reason is None:
                return own.run
            _log_fallback(self.name, backend, reason)
        return self.implementations["torch", case].run

    def importable(self) -> dict[tuple[Backend, str], Implementation]:
        """Return all implementations that can be imported here, whatever the device."""
        for backend in BACKENDS:
            if backend != "triton" or _has_triton():
                self._import(backend)
        return dict(self.implementations)

    def _import(self, backend: Backend) -> None:
        self._imported.add(backend)
        if importlib.util.find_spec(f"{self._package}.{backend}") is not None:
            importlib.import_module(f"{self._package}.{backend}")


def backend_for(device: torch.device) -> Backend:
    """Choose the backend for tensors on ``device``.

    Raises:
        InputError: ``KVCAR_KERNELS`` names no backend.
        KernelError: it names one that cannot run here.
    """
    return _backend(os.environ.get(VARIABLE, ""), device.type, os.environ.get("TRITON_INTERPRET", ""))


@cache
def _log_fallback(operation: str, backend: Backend, reason: str) -> None:
    _log.info("%s: PyTorch, as the %s kernel does not support this: %s", operation, backend, reason)


@cache
def _backend(given: str, device: str, interpreted: str) -> Backend:
    if given:
        for name in BACKENDS:
            if name == given:
                _refuse_missing(name, device, interpreted)
                _log.info("kernels on %s: %s, from %s", device, name, VARIABLE)
                return name
        raise InputError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, got {given!r}")
    name, why = _default(device)
    # What costs speed is worth a warning.
    _log.log(logging.WARNING if name == "torch" else logging.INFO, "kernels on %s: %s, %s", device, name, why)
    return name


def _default(device: str) -> tuple[Backend, str]:
    if device == "cpu":
        compiler = find_compiler()
        if compiler is None:
            return "torch", "as no C compiler was found (cc, gcc, clang or CC); decoding is several times slower so"
        try:
            native_library()
        except KernelError as error:
            return "torch", f"decoding several times slower so: {error}"
        return "cpu", f"compiled by {compiler.version}"
    if device == "cuda":
        if not _has_triton():
            return "torch", "as Triton is not installed; pip install 'kvcar[triton]' for faster decoding"
        return "triton", "as Triton is installed"
    return "torch", "which runs on any device"


def _refuse_missing(name: Backend, device: str, interpreted: str) -> None:
    if name == "cpu" and device != "cpu":
        raise KernelError(f"{VARIABLE}=cpu, but the model is on {device}; unset it, or take torch or triton")
    if name == "cpu":
        native_library()  # now, and not when the prompt is computed
    if name != "triton":
        return
    if not _has_triton():
        raise KernelError(f"{VARIABLE}=triton, but Triton is not installed; pip install 'kvcar[triton]'")
    if device == "cpu" and interpreted != "1":
        raise KernelError(
            f"{VARIABLE}=triton runs on a CPU in Triton's interpreter only: set TRITON_INTERPRET=1 too (slow)"
        )


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
