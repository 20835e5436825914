"""Compiled kernels: kept where nobody else writes, compiled anew where damaged, done without where they cannot be had."""

import ctypes
import logging
import os
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch
from tiny import tiny_model, token_ids

import kvcar
from kvcar import files
from kvcar.errors import KernelError
from kvcar.kernels import backend
from kvcar.kernels.native import build, find_compiler, native_library

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="modes and scripts of POSIX"),
    pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler"),
]
CPU = torch.device("cpu")


def forget():
    build.native_library.cache_clear()
    build.find_compiler.cache_clear()
    backend._backend.cache_clear()


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """An empty folder for kernels, and nothing known of compilers; CC does what makes a library quickly."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv("KVCAR_KERNEL_CACHE", str(folder))
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(build, "_FLAGS", ("-O0", "-shared", "-fPIC"))
    forget()
    yield folder
    monkeypatch.undo()
    forget()


def compiler(tmp_path, monkeypatch, body):
    """A compiler that is a shell script: it says its version, and does ``body`` when it is to compile."""
    script = tmp_path / "mycc"
    script.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo mycc 1.0; exit 0;; esac\n{body}\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    forget()
    return script


def made_in(folder):
    return sorted(path.name for path in folder.iterdir())


def loaded_again():
    build.native_library.cache_clear()
    return native_library()


def test_kernels_are_compiled_once_into_the_folder_that_is_named(kernels):
    native_library()
    (made,) = kernels.iterdir()
    assert made.suffix == ".so"
    stamp = made.stat().st_mtime_ns
    assert loaded_again()._name == str(made)
    assert made.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_folder_and_library_are_this_users_alone(kernels, tmp_path, monkeypatch, umask):
    monkeypatch.setenv("KVCAR_KERNEL_CACHE", str(tmp_path / "a" / "b"))
    before = os.umask(umask)
    try:
        native_library()
    finally:
        os.umask(before)
    (made,) = (tmp_path / "a" / "b").iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (made, made.parent, made.parent.parent)] == [0o700] * 3


def planted(folder, content=b"planted"):
    """Put a library where the next process would look for one, with a right hash in its name."""
    native_library()
    (own,) = folder.iterdir()
    stem = own.name.rpartition("-")[0]
    own.unlink()
    path = folder / "planted"
    path.write_bytes(content)
    return path.rename(folder / build._kept_name(stem, path))


def test_nothing_is_loaded_from_a_folder_that_others_may_write(kernels, monkeypatch, caplog):
    path = planted(kernels)
    kernels.chmod(0o1777)
    monkeypatch.setattr(ctypes, "CDLL", recorded := Recorded(ctypes.CDLL))
    loaded_again()
    assert str(path) not in recorded.names
    assert "others may write" in caplog.text
    assert made_in(kernels) == [path.name], "and nothing is written there"


@pytest.mark.parametrize("change", ["mode", "owner", "link"])
def test_no_library_is_loaded_that_others_may_change(kernels, tmp_path, monkeypatch, change):
    path = planted(kernels)
    if change == "mode":
        path.chmod(0o666)
    elif change == "owner":
        if os.geteuid():
            pytest.skip("needs the right to give files away")
        os.chown(path, 12345, -1)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(ctypes, "CDLL", recorded := Recorded(ctypes.CDLL))
    loaded_again()
    assert str(path) not in recorded.names
    assert len(made_in(kernels)) == 1
    assert path.name not in made_in(kernels)


class Recorded:
    def __init__(self, real):
        self.real, self.names = real, []

    def __call__(self, name, *rest):
        self.names.append(name)
        return self.real(name, *rest)


@pytest.mark.parametrize("damage", ["half", "nothing", "junk"])
def test_a_damaged_library_is_compiled_anew_once(kernels, damage):
    native_library()
    (made,) = kernels.iterdir()
    whole = made.read_bytes()
    path = made.with_name("staged")  # another file: what is loaded already stays as it is
    path.write_bytes({"half": whole[: len(whole) // 2], "nothing": b"", "junk": b"junk" * 1000}[damage])
    path.chmod(0o700)
    path.replace(made)
    assert loaded_again().kvcar_columns() > 0
    (made,) = kernels.iterdir()
    stamp = made.stat().st_mtime_ns
    assert loaded_again()._name == str(made)
    assert made.stat().st_mtime_ns == stamp


def test_a_library_without_the_functions_is_compiled_anew(kernels, tmp_path):
    (tmp_path / "empty.c").write_text("int nothing;\n")
    library = tmp_path / "empty.so"
    subprocess.run([find_compiler().path, "-shared", "-fPIC", "-o", library, tmp_path / "empty.c"], check=True)
    path = planted(kernels, library.read_bytes())
    path.chmod(0o700)
    assert loaded_again().kvcar_columns() > 0
    assert path.name not in made_in(kernels)


BROKEN = {
    "fails": "echo no; exit 1",
    "prints junk": r"printf '\377\376\200junk'; printf '\377\376' >&2; exit 1",
    "does nothing": "exit 0",
    "is killed": "kill -9 $$",
    "writes junk": 'while [ "$1" != -o ]; do shift; done; echo junk > "$2"',
    "writes nothing": 'while [ "$1" != -o ]; do shift; done; : > "$2"',
    "makes no functions": 'while [ "$1" != -o ]; do shift; done; echo "int x;" | cc -x c -shared -fPIC -o "$2" -',
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_compiler_that_is_broken_is_done_without(kernels, tmp_path, monkeypatch, caplog, broken):
    """With one warning, when the model is attached and not in the middle of its first prompt."""
    compiler(tmp_path, monkeypatch, BROKEN[broken])
    model = tiny_model("llama")
    bundle = kvcar.lossless(model)
    with caplog.at_level(logging.WARNING, "kvcar"), kvcar.attach(model, bundle):
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "kernels on cpu: torch" in caplog.text
        model.generate(token_ids(100), max_new_tokens=3, do_sample=False)
    assert len(caplog.records) == 1
    assert made_in(kernels) == []


def test_a_broken_compiler_that_was_asked_for_is_an_error_at_once(kernels, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "echo no >&2; exit 1")
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    with pytest.raises(KernelError, match=r"could not compile the CPU kernels; set KVCAR_KERNELS=torch(?s:.*)no"):
        backend.backend_for(CPU)


def test_kernels_that_cannot_be_loaded_are_told(kernels, monkeypatch):
    """As where torch has no OpenMP, whose function is then missing."""
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DGOMP_parallel=missing_function"))
    with pytest.raises(KernelError, match=r"could not be loaded; set KVCAR_KERNELS=torch.*missing_function"):
        native_library()
    assert made_in(kernels) == []


def test_a_compiler_that_never_ends_is_waited_for_once(kernels, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, f"echo x >> {tmp_path}/runs; exec sleep 20")
    monkeypatch.setattr(build, "_COMPILE_SECONDS", 0.5)
    assert backend.backend_for(CPU) == "torch"
    assert (tmp_path / "runs").read_text() == "x\n"
    assert made_in(kernels) == []


def test_a_compiler_gets_the_arguments_that_come_with_it(kernels, tmp_path, monkeypatch):
    script = compiler(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/given; exec cc "$@"')
    monkeypatch.setenv("CC", f"{script} -DFIRST '-DSECOND=a b'")
    forget()
    assert find_compiler().arguments == ("-DFIRST", "-DSECOND=a b")
    native_library()
    assert (tmp_path / "given").read_text().startswith("-DFIRST -DSECOND=a b ")


@pytest.mark.parametrize("name", ["no-such-compiler", "gcc 'unbalanced", "  ", "false"])
def test_another_compiler_is_not_taken_in_silence(kernels, monkeypatch, caplog, name):
    monkeypatch.setenv("CC", name)
    forget()
    assert find_compiler() is not None
    assert f"CC is {name!r}, which is no C compiler" in caplog.text


@pytest.mark.parametrize("where", ["no home", "no right to write", "a file", "NUL"])
def test_without_a_folder_kernels_are_compiled_for_the_process(kernels, tmp_path, monkeypatch, caplog, where):
    monkeypatch.delenv("KVCAR_KERNEL_CACHE")
    if where == "no home":
        for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os, "getuid", lambda: 54321)
    elif where == "no right to write":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    elif where == "a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("KVCAR_KERNEL_CACHE", str(tmp_path / "file"))
    else:
        # The environment cannot hold one; what reads it could.
        monkeypatch.setattr(build, "_user_cache", lambda: tmp_path / "a\0b")
    assert backend.backend_for(CPU) == "cpu"
    assert "compiled for every process" in caplog.text


def test_a_folder_that_does_not_let_code_run_is_done_without(kernels, monkeypatch):
    real = ctypes.CDLL

    def load(name, *rest):
        if name.startswith(str(kernels)):
            raise OSError(f"{name}: failed to map segment from shared object")
        return real(name, *rest)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert backend.backend_for(CPU) == "cpu"
    assert made_in(kernels) == []


def test_a_full_folder_is_done_without(kernels, monkeypatch):
    real = files.staging_folder

    def full(parent, mode):
        if parent == kernels:
            raise OSError(28, "No space left on device")
        return real(parent, mode)

    monkeypatch.setattr(build, "staging_folder", full)
    assert backend.backend_for(CPU) == "cpu"


def test_what_a_killed_compilation_leaves_goes_with_the_next(kernels, tmp_path, monkeypatch):
    kernels.mkdir(mode=0o700)
    compiler(tmp_path, monkeypatch, f"touch {tmp_path}/begun; exec sleep 5")
    code = "import torch; from kvcar.kernels.native import native_library; native_library()"
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    alive = made_in(kernels)
    files.remove_leftovers(kernels)
    assert made_in(kernels) == alive, "of a process that lives"
    child.kill()
    child.wait()
    assert len(made_in(kernels)) == 1
    compiler(tmp_path, monkeypatch, 'exec cc "$@"')
    native_library()
    assert [name.rpartition(".")[2] for name in made_in(kernels)] == ["so"]


def test_threads_compile_once(kernels, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, f'echo x >> {tmp_path}/runs; exec cc "$@"')
    threads = [threading.Thread(target=native_library) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "runs").read_text() == "x\n"
