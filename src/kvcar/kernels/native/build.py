"""Compiling the C kernels on first use, for the very CPU they run on.

As Triton and torch.compile do, this needs a C compiler where the library runs; none is needed to install it. What is
compiled is kept in a cache folder under a name that holds a hash of sources, compiler, flags and CPU, and one of the
library itself, so that a damaged one is compiled anew. Nothing is loaded from a folder or file that others may write.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...errors import KernelError
from ...files import staging_folder, sync_folder

_SOURCES = Path(__file__).parent
# Sums may be reordered, which vectors need, and products added in one operation; infinities and NaN keep their meaning.
_FLAGS = (
    "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast",
    "-shared", "-fPIC",
)  # fmt: skip
_FUNCTIONS = ("kvcar_attend", "kvcar_columns", "kvcar_pack", "kvcar_scratch", "kvcar_unpack")
_CACHE_VARIABLE = "KVCAR_KERNEL_CACHE"
_COMPILE_SECONDS = 300
_WITHOUT = "set KVCAR_KERNELS=torch to do without"
_log = logging.getLogger("kvcar.kernels")
_compiling = threading.Lock()


@dataclass(frozen=True)
class Compiler:
    """A C compiler on this machine: its path, the first line of what it says it is, and arguments that it always gets."""

    path: str
    version: str
    arguments: tuple[str, ...] = ()


@cache
def find_compiler() -> Compiler | None:
    """Find the C compiler in the variable CC, or cc, gcc or clang on the path; None where there is none."""
    given = os.environ.get("CC")
    own = compiler_at(given) if given else None
    if own is not None:
        return own
    found = next((compiler for compiler in map(compiler_at, ("cc", "gcc", "clang")) if compiler is not None), None)
    if given:
        _log.warning(
            "CC is %r, which is no C compiler that runs here; taking %s", given, found.path if found else "none"
        )
    return found


def compiler_at(name: str) -> Compiler | None:
    """Find the compiler of that name or path, arguments after it (``gcc -m64``); None where there is none that runs."""
    try:
        words = [name] if shutil.which(name) else shlex.split(name, posix=os.name != "nt")
    except ValueError:
        return None
    path = shutil.which(words[0]) if words else None
    if path is None:
        return None
    try:
        found = _ran([path, *words[1:], "--version"], 30)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    version = (found.stdout.splitlines() or [""])[0][:200]
    return Compiler(path, version, tuple(words[1:])) if found.returncode == 0 else None


@cache
def native_library() -> ctypes.CDLL:
    """Load the kernels, compiled if need be.

    Raises:
        KernelError: there is no C compiler, or what it makes cannot be loaded, as where torch was built without OpenMP.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KernelError(
            "the CPU kernels need a C compiler (cc, gcc, clang or the one CC names) and none was found; install one "
            f"or {_WITHOUT.removesuffix(' to do without')}"
        )
    flags = (*_FLAGS, *_architecture_flags())
    with _compiling:
        folder, stem = _cache_folder(), f"kernels-{_digest(compiler, flags)}"
        kept = None if folder is None else _load_kept(folder, stem)
        return _make(compiler, flags, folder, stem) if kept is None else kept


def _load_kept(folder: Path, stem: str) -> ctypes.CDLL | None:
    """Load what was compiled before; None where there is nothing of it that is whole and nobody else's."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        try:
            if _is_private(path) and path.name == _kept_name(stem, path):
                return _load(path)
        except (OSError, KernelError):
            continue
    return None


def _make(compiler: Compiler, flags: tuple[str, ...], folder: Path | None, stem: str) -> ctypes.CDLL:
    """Compile into the cache folder, or for this process alone where that folder is full, or does not let code run."""
    problem = None
    for parent in (folder, _temporary_folder()):
        if parent is None:
            continue
        try:
            return _make_in(parent, compiler, flags, None if parent is not folder else stem)
        except (OSError, ValueError) as error:
            problem = KernelError(f"the CPU kernels cannot be compiled in {parent}: {error}; {_WITHOUT}")
        except subprocess.TimeoutExpired:
            problem = KernelError(f"{compiler.path} did not end within {_COMPILE_SECONDS} s; {_WITHOUT}")
            break
        except KernelError as error:
            problem = error
    raise problem or KernelError(f"there is no folder to compile the CPU kernels in; {_WITHOUT}")


def _make_in(parent: Path, compiler: Compiler, flags: tuple[str, ...], stem: str | None) -> ctypes.CDLL:
    """Compile in a folder of ``parent`` that only this user may enter; kept in ``parent`` if it loads and has a name there."""
    with staging_folder(parent, 0o700) as staging:
        made = staging / "kernels.so"
        _compile(compiler, flags, made)
        library = _load(made)
        if stem is not None:
            with suppress(OSError):  # it is loaded; keeping it saves time the next time
                _keep(made, parent / _kept_name(stem, made))
        return library


def _keep(made: Path, target: Path) -> None:
    made.chmod(0o700)
    with made.open("rb") as written:
        os.fsync(written.fileno())
    for old in target.parent.glob(f"{target.name.rpartition('-')[0]}-*.so"):
        old.unlink()  # damaged, or somebody else's
    made.replace(target)
    sync_folder(target.parent)


def _kept_name(stem: str, library: Path) -> str:
    return f"{stem}-{hashlib.sha256(library.read_bytes()).hexdigest()[:32]}.so"


def _load(path: Path) -> ctypes.CDLL:
    """Load with torch's threads, which are found by name (``parallel.h``): torch, imported
    by whoever has tensors for the kernels, made its OpenMP runtime known to all.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the CPU kernels could not be loaded; {_WITHOUT}: {error}") from None
    missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
    if missing:
        raise KernelError(f"the CPU kernels were compiled without {', '.join(missing)}; {_WITHOUT}")
    return library


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


def _cache_folder() -> Path | None:
    """Return where compiled kernels are kept; None, with a warning, where there is no such place that is safe."""
    given = os.environ.get(_CACHE_VARIABLE)
    try:
        folder = Path(given) if given else _user_cache() / "kvcar" / "kernels"
        _make_private(folder.absolute())
        if not given and _is_own(folder):
            folder.chmod(0o700)  # made by an earlier version, perhaps, whatever the umask was
        if _is_private(folder):
            return folder
        why = f"others may write to {folder} (chmod 700 it if it is yours)"
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error)
    _log.warning(
        "compiled kernels are not kept, but compiled for every process: %s; %s names a folder for them",
        why,
        _CACHE_VARIABLE,
    )
    return None


def _user_cache() -> Path:
    """Raises RuntimeError where the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _temporary_folder() -> Path | None:
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return None


def _make_private(folder: Path) -> None:
    """Make a folder and those above it that are missing, for this user alone whatever the umask."""
    if not folder.is_dir():
        _make_private(folder.parent)
        folder.mkdir(0o700, exist_ok=True)


def _is_own(path: Path) -> bool:
    return os.name != "nt" and path.lstat().st_uid == os.geteuid()


def _is_private(path: Path) -> bool:
    """Whether this user or root owns a file or folder, and nobody else may change it."""
    if os.name == "nt":
        return True
    found = path.stat() if path.is_dir() else path.lstat()
    regular = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    return regular and found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def _compile(compiler: Compiler, flags: tuple[str, ...], made: Path) -> None:
    sources = [str(path) for path in sorted(_SOURCES.glob("*.c"))]
    command = [compiler.path, *compiler.arguments, *flags, "-o", str(made), *sources, "-lm"]
    try:
        # Its temporary files go with the folder, whatever happens to it.
        result = _ran(command, _COMPILE_SECONDS, TMPDIR=str(made.parent))
    except OSError as error:
        raise KernelError(f"the C compiler {compiler.path} could not be run: {error}; {_WITHOUT}") from None
    if result.returncode or not made.is_file():
        last = "\n".join(result.stderr.strip().splitlines()[-5:])
        how = f"ended with {result.returncode}" if result.returncode else "wrote nothing"
        raise KernelError(f"{compiler.path} could not compile the CPU kernels; {_WITHOUT}: it {how}\n{last}".rstrip())


def _ran(command: list[str], seconds: int, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a compiler; what it prints may be anything."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, timeout=seconds,
        stdin=subprocess.DEVNULL, env={**os.environ, **variables},
    )  # fmt: skip
