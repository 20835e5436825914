"""A bundle's folder: written whole or not at all, checked on the way in, and shared on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from ..errors import BundleError, PlanError
from ..plan import FORMAT_VERSION

PLAN_FILE, CODECS_FILE, CARD_FILE = "plan.json", "codecs.safetensors", "README.md"
FILES = (PLAN_FILE, CODECS_FILE, CARD_FILE)


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 in hex over everything that a manifest says but for its own checksum."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_target(folder: Path, overwrite: bool) -> None:
    """Make sure, before any work is done, that a bundle can be written to ``folder``; raises BundleError."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not (folder / PLAN_FILE).is_file():
            raise BundleError(f"{folder} exists and is not a bundle; choose another folder")
        if not overwrite:
            raise BundleError(f"{folder} already holds a bundle; choose another folder or ask to overwrite it")
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES)
        if foreign:
            raise BundleError(
                f"{folder} holds more than a bundle ({', '.join(foreign[:3])}), which overwriting would delete; choose another "
                "folder, or move those files away"
            )
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".kvcar-"):
            pass
    except OSError as error:
        raise BundleError(f"cannot write to {parent}: {error.strerror}; choose a folder you may write to") from None


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write to a temporary neighbour and rename, so that an interruption leaves no half bundle."""
    parent = folder.absolute().parent
    try:
        staging = Path(tempfile.mkdtemp(dir=parent, prefix=".kvcar-"))
    except OSError as error:
        raise BundleError(f"cannot write to {parent}: {error.strerror}; choose a folder you may write to") from None
    try:
        for name, data in files.items():
            (staging / name).write_bytes(data)
        staging.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(dir=parent, prefix=".kvcar-"))
            os.replace(folder, old)
            try:
                os.replace(staging, folder)
            except BaseException:
                os.replace(old, folder)
                raise
            shutil.rmtree(old)
        else:
            os.replace(staging, folder)
    except OSError as error:
        raise BundleError(f"cannot write {folder}: {error.strerror or error}; nothing was changed") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read ``plan.json`` and check its version and its checksum.

    Raises:
        BundleError: there is no bundle, or its manifest is damaged.
        PlanError: it is of another version.
    """
    path = folder / PLAN_FILE
    if not folder.is_dir():
        raise BundleError(f"there is no bundle at {folder}; 'kvcar fit' writes one")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {PLAN_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}; fit the bundle again") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise PlanError(
            f"{path} is of bundle format {version!r}, and this kvcar reads format {FORMAT_VERSION}; "
            + ("fit the bundle again" if version == 1 else "upgrade kvcar, or fit the bundle again")
        )
    found = manifest_digest(data)
    if found != data.get("sha256"):
        raise BundleError(
            f"{path} was changed: the SHA-256 of its contents is {found[:12]}..., it says {str(data.get('sha256'))[:12]}...; "
            "copy the bundle again or fit it again"
        )
    return data


def read_codecs(folder: Path, expected_sha256: object) -> dict[str, Tensor]:
    """Read ``codecs.safetensors``; raises BundleError unless it is the file that the manifest was written with."""
    path = folder / CODECS_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}; fit the bundle again") from None
    found = hashlib.sha256(data).hexdigest()
    if found != expected_sha256:
        raise BundleError(
            f"{path} is truncated or was changed: its SHA-256 is {found[:12]}..., the plan expects "
            f"{str(expected_sha256)[:12]}...; copy the bundle again or fit it again"
        )
    try:
        return load_safetensors(data)
    except SafetensorError as error:
        raise BundleError(f"{path} is not a readable safetensors file: {error}; fit the bundle again") from None


def local_folder(source: str | Path, **download: Any) -> Path:
    """The folder of a bundle: ``source`` itself, or what was downloaded of the hub's ``owner/name`` or ``owner/name@revision``.

    Args:
        source: a folder, or a bundle on the hub where there is no such folder.
        download: ``revision``, ``token``, ``cache_dir`` and so on; see ``huggingface_hub.snapshot_download``.

    Raises:
        BundleError: it is neither, or the hub does not give it.
    """
    folder = Path(source)
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(.+))?", str(source)) if isinstance(source, str) else None
    if folder.exists() or found is None or str(source).startswith("."):
        return folder
    from huggingface_hub import snapshot_download

    if found[2] is not None:
        download["revision"] = found[2]
    try:
        return Path(snapshot_download(found[1], allow_patterns=list(FILES), **download))
    except Exception as error:  # the hub's own errors, and those of whatever it reaches the network with
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BundleError(
            f"there is no folder {source}, and the hub has no such bundle that can be read: {first} (the hub needs the "
            "network, and a login for a private bundle)"
        ) from None


def upload(folder: Path, repo_id: str, private: bool | None, token: str | bool | None, **commit: Any) -> str:
    """Upload a bundle's folder to the hub, which is asked for the repository first; returns its address.

    Raises:
        BundleError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, allow_patterns=list(FILES), **commit)
    except Exception as error:  # the hub's own errors, and those of whatever it reaches the network with
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BundleError(
            f"the hub did not take the bundle as {repo_id}: {first} (it needs the network, a login, and the right to write)"
        ) from error
    return str(repository)
