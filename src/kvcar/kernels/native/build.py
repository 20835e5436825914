"""Compiling the C kernels on first use, for the very CPU they run on.

As Triton and torch.compile do, this needs a C compiler where the library runs; none is needed to install it. What is
compiled is kept in a cache folder under a name that holds a hash of sources, compiler, flags and CPU, and never
anything else.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...errors import KernelError

_SOURCES = Path(__file__).parent
# Sums may be reordered, which vectors need, and products added in one operation; infinities and NaN keep their meaning.
_FLAGS = (
    "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast",
    "-shared", "-fPIC",
)  # fmt: skip
_CACHE_VARIABLE = "KVCAR_KERNEL_CACHE"


@dataclass(frozen=True)
class Compiler:
    """A C compiler on this machine: its path and the first line of what it says it is."""

    path: str
    version: str


@cache
def find_compiler() -> Compiler | None:
    """Find the C compiler in the variable CC, or cc, gcc or clang on the path; None where there is none."""
    found = (compiler_at(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name)
    return next((compiler for compiler in found if compiler is not None), None)


def compiler_at(name: str) -> Compiler | None:
    """Find the compiler of that name or path; None where there is none, or none that runs."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        found = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return Compiler(path, (found.stdout.splitlines() or [""])[0])


@cache
def native_library() -> ctypes.CDLL:
    """Load the kernels, compiled if need be.

    Raises:
        KernelError: there is no C compiler, or it fails, or torch was built without OpenMP.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KernelError(
            "the CPU kernels need a C compiler (cc, gcc, clang or the one CC names) and none was found; install one "
            "or set KVCAR_KERNELS=torch"
        )
    flags = (*_FLAGS, *_architecture_flags())
    target = _cache_folder() / f"kernels-{_digest(compiler, flags)}.so"
    if not target.exists():
        _compile(compiler, flags, target)
    return _load(target)


def _load(target: Path) -> ctypes.CDLL:
    """Load with torch's threads, which are found by name (``parallel.h``): torch, imported
    by whoever has tensors for the kernels, made its OpenMP runtime known to all.
    """
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise KernelError(
            f"the CPU kernels could not be loaded; set KVCAR_KERNELS=torch to do without: {error}"
        ) from None


def _architecture_flags() -> tuple[str, ...]:
    """Return flags for this CPU; clang on Apple's CPUs calls it otherwise."""
    return ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)


def _digest(compiler: Compiler, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(f"{compiler}\n{flags}\n{_cpu()}\n".encode())
    for path in sorted(_SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """Describe what distinguishes CPUs that need other code; a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _cache_folder() -> Path:
    """Return where compiled kernels are kept; a folder of this process alone where that cannot be written to."""
    given = os.environ.get(_CACHE_VARIABLE)
    folder = (
        Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcar" / "kernels"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return Path(tempfile.mkdtemp(prefix="kvcar-kernels-"))
    return folder


def _compile(compiler: Compiler, flags: tuple[str, ...], target: Path) -> None:
    """Compile into a file beside the target and move it there, so that no one ever loads half a file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "kernels.so"
        sources = [str(path) for path in sorted(_SOURCES.glob("*.c"))]
        command = [compiler.path, *flags, "-o", str(made), *sources, "-lm"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            raise KernelError(f"the C compiler {compiler.path} could not be run: {error}") from None
        if result.returncode:
            last = "\n".join(result.stderr.strip().splitlines()[-5:])
            raise KernelError(
                f"{compiler.path} could not compile the CPU kernels; set KVCAR_KERNELS=torch to do without:\n{last}"
            )
        made.replace(target)
