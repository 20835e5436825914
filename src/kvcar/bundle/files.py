"""A bundle's folder: written whole or not at all, checked on the way in, and shared on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from ..errors import BundleError, PlanError
from ..files import (
    is_staging,
    locked_folder,
    parsed_json,
    read_regular,
    reason_of,
    remove_leftovers,
    staged_file,
    staging_folder,
    sync_folder,
)
from ..plan import FORMAT_VERSION

PLAN_FILE, CODECS_FILE, CARD_FILE = "plan.json", "codecs.safetensors", "README.md"
FILES = (PLAN_FILE, CODECS_FILE, CARD_FILE)
_INTERIM = re.compile(r"codecs-[0-9a-f]{32}\.safetensors")
_ATTEMPTS, _MAX_PLAN_BYTES = 20, 64 << 20


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 in hex over everything that a manifest says but for its own checksum."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_target(folder: Path, overwrite: bool) -> None:
    """Make sure, before any work is done, that a bundle can be written to ``folder``; raises BundleError."""
    folder = _real(folder)
    if folder.exists() and not (folder.is_dir() and all(map(_is_ours, folder.iterdir()))):
        if not (folder / PLAN_FILE).is_file():
            raise BundleError(f"{folder} exists and is not a bundle; choose another folder")
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES and not _is_ours(entry))
        if overwrite and foreign:
            raise BundleError(
                f"{folder} holds more than a bundle ({', '.join(foreign[:3])}); choose another folder, or move those files away"
            )
        if not overwrite:
            raise _already_there(folder)
    place = folder if folder.exists() else folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        with staging_folder(place):
            pass
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot write to {place}: {reason_of(error)}; choose a folder you may write to") from None


def write_folder(folder: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Write a bundle's files, whole or not at all; a symbolic link is followed.

    A new folder appears with all its files. In one that is there the codecs come first, under a name that holds their
    SHA-256; renaming the manifest then makes the new bundle the one that is read, whatever becomes of the writer, and
    the codecs get their usual name last. Writers wait for each other.
    """
    folder = _real(folder)
    try:
        if not folder.is_dir() and _write_new(folder, files):
            return
        with locked_folder(folder):
            if (folder / PLAN_FILE).exists() and not overwrite:
                raise _already_there(folder)
            _overwrite(folder, files)
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot write {folder}: {reason_of(error)}; nothing was changed") from None


def _write_new(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Write a folder that is not there yet; False where another writer was faster."""
    with staging_folder(folder.parent) as staging:
        for name, data in files.items():
            with staged_file(staging, [data]) as staged:
                os.replace(staged, staging / name)
        sync_folder(staging)
        try:
            os.rename(staging, folder)
        except OSError:
            if folder.is_dir():
                return False
            raise
        sync_folder(folder.parent)
    return True


def _overwrite(folder: Path, files: Mapping[str, bytes]) -> None:
    _settle(folder)
    interim = folder / _interim_name(hashlib.sha256(files[CODECS_FILE]).hexdigest())
    with ExitStack() as stack:
        staged = {name: stack.enter_context(staged_file(folder, [data])) for name, data in files.items()}
        os.replace(staged.pop(CODECS_FILE), interim)
        sync_folder(folder)
        try:
            os.replace(staged.pop(PLAN_FILE), folder / PLAN_FILE)
        except BaseException:
            interim.unlink()
            raise
        sync_folder(folder)
        for name, path in staged.items():
            os.replace(path, folder / name)
    _settle(folder)


def _settle(folder: Path) -> None:
    """Give codecs that the manifest names their usual name, and remove those that it does not."""
    remove_leftovers(folder)
    for path in [entry for entry in folder.iterdir() if _INTERIM.fullmatch(entry.name)]:
        if path.name == _interim_name(_named_sha256(folder)):
            os.replace(path, folder / CODECS_FILE)
        else:
            path.unlink()
    sync_folder(folder)


def _named_sha256(folder: Path) -> str:
    try:
        return str(json.loads((folder / PLAN_FILE).read_bytes())["codecs_sha256"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""  # there is no bundle yet, or a damaged one: its codecs have their usual name or none


def _interim_name(sha256: str) -> str:
    return f"codecs-{sha256[:32]}.safetensors"


def _is_ours(entry: Path) -> bool:
    """Whether a file is one that a killed writer left."""
    return is_staging(entry.name) or _INTERIM.fullmatch(entry.name) is not None


def _real(folder: Path) -> Path:
    try:
        return Path(os.path.realpath(folder))
    except ValueError as error:
        raise BundleError(f"{str(folder)!r} is no path: {error}") from None


def _already_there(folder: Path) -> BundleError:
    return BundleError(f"{folder} already holds a bundle; choose another folder or ask to overwrite it")


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the manifest and the codecs that were written with it, even while somebody overwrites them.

    Raises:
        BundleError: there is no bundle, or a file is missing, truncated or changed.
        PlanError: it is of another version.
    """
    attempt, before = 0, None
    while True:
        manifest = read_manifest(folder)
        sha256 = manifest.get("codecs_sha256")
        try:
            return manifest, read_codecs(folder / CODECS_FILE, sha256)
        except _OtherCodecsError as error:
            # The same manifest again, and nobody is overwriting it.
            if attempt == _ATTEMPTS or (attempt and manifest == before):
                raise BundleError(str(error)) from None
        with suppress(_OtherCodecsError):
            return manifest, read_codecs(folder / _interim_name(str(sha256)), sha256)
        attempt, before = attempt + 1, manifest


class _OtherCodecsError(BundleError):
    """The file is missing, or not the one that the manifest names."""


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
        data = parsed_json(read_regular(path, _MAX_PLAN_BYTES))
        found = manifest_digest(data) if isinstance(data, dict) else ""
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {PLAN_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = "arrays nested too deep" if isinstance(error, RecursionError) else reason_of(error)
        raise BundleError(f"{path} cannot be read: {reason}; copy the bundle again or fit it again") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise PlanError(
            f"{path} is of bundle format {str(version)[:20]}, and this kvcar reads format {FORMAT_VERSION}; "
            + ("fit the bundle again" if version == 1 else "upgrade kvcar, or fit the bundle again")
        )
    if found != data.get("sha256"):
        raise BundleError(
            f"{path} was changed: the SHA-256 of its contents is {found[:12]}..., it says {str(data.get('sha256'))[:12]}...; "
            "copy the bundle again or fit it again"
        )
    return data


def read_codecs(path: Path, expected_sha256: object) -> dict[str, Tensor]:
    """Read a file of codecs; raises BundleError unless it is the file that the manifest was written with."""
    try:
        data = read_regular(path)
    except (OSError, ValueError) as error:
        raise _OtherCodecsError(
            f"{path} cannot be read: {reason_of(error)}; copy the bundle again or fit it again"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != expected_sha256:
        raise _OtherCodecsError(
            f"{path} is truncated or was changed: its SHA-256 is {found[:12]}..., the plan expects "
            f"{str(expected_sha256)[:12]}...; copy the bundle again or fit it again"
        )
    try:
        return load_safetensors(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        # A dtype that torch lacks, for one, is none of safetensors' own errors.
        raise BundleError(
            f"{path} is not a readable safetensors file: {error}; copy the bundle again or fit it again"
        ) from None


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
