"""A bundle is a folder: ``plan.json``, ``codecs.safetensors`` and ``README.md``. Fit writes it, every runtime reads it.

``plan.json`` holds a manifest (the plan, which model it was fitted for, how, and the SHA-256 of the codecs).
Loading checks versions, shapes, ranges and checksums, and ``check_model`` that the model is the one it was fitted for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from transformers import PreTrainedModel

from .codecs import CODECS, Codec, Quantizer, read_quantizer
from .errors import BundleError, ModelMismatchError, PlanError
from .models.fingerprint import Fingerprint, fingerprint, mismatch
from .models.geometry import read_geometry
from .plan import FORMAT_VERSION, Block, Plan
from .geometry import StrictModel

PLAN_FILE, CODECS_FILE, CARD_FILE = "plan.json", "codecs.safetensors", "README.md"


class ModelIdentity(StrictModel):
    """Which model a bundle was fitted for; the sampled weights themselves lie in the codecs file."""

    name: str
    architecture: str
    dtype: str
    fingerprint: str


class FitProvenance(StrictModel):
    """How a bundle came to be."""

    kvcar_version: str
    torch_version: str
    transformers_version: str
    date: str
    text: str
    text_sha256: str
    tokens: int
    context: int
    seed: int
    options: dict[str, str | int | float | bool | None]


def identify(model: PreTrainedModel, name: str) -> tuple[Fingerprint, ModelIdentity]:
    """What ties a bundle to a model: sampled weights, and who it is."""
    print_ = fingerprint(model)
    return print_, ModelIdentity(
        name=name, architecture=type(model).__name__, dtype=print_.dtype, fingerprint=print_.digest
    )


@dataclass(frozen=True)
class CodedBlock:
    """The codec and quantiser of one block; both None for a lossless one."""

    codec: Codec | None
    quantizer: Quantizer | None

    def tensors(self) -> dict[str, Tensor]:
        """What the codecs file stores for the block."""
        if self.codec is None or self.quantizer is None:
            return {}
        return self.codec.tensors() | {f"quantizer.{k}": v for k, v in self.quantizer.tensors().items()}

    def round_trip(self, x: Tensor) -> Tensor:
        """What the cache gives back for vectors float32 ``[..., W]``."""
        if self.codec is None or self.quantizer is None:
            return x
        return self.codec.decode(self.quantizer.latents(self.quantizer.codes(self.codec.encode(x))))

    def on(self, device: torch.device, block: Block, head_dim: int) -> CodedBlock:
        """The same with its tensors on a device; ``block`` is the plan's."""
        return CodedBlock.from_tensors({name: t.to(device) for name, t in self.tensors().items()}, block, head_dim)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], block: Block, head_dim: int) -> CodedBlock:
        """Rebuild and check; raises BundleError."""
        if block.lossless:
            return cls(None, None)
        prefix = "quantizer."
        own = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
        scales = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        codec = CODECS[block.codec].from_tensors(own, len(block.slots) * head_dim, block.latents)
        return cls(codec, read_quantizer(scales, block))


@dataclass(frozen=True)
class Bundle:
    """Everything needed to compress the cache of one model.

    Attributes:
        plan: how each slot is stored.
        blocks: codec and quantiser per block of the plan.
        fingerprint: sampled weights of the model that it was fitted for.
        model: that model's name and kind.
        fit: how it was fitted.
    """

    plan: Plan
    blocks: tuple[CodedBlock, ...]
    fingerprint: Fingerprint
    model: ModelIdentity
    fit: FitProvenance

    @property
    def codec_bytes(self) -> int:
        """Bytes of the codecs' own parameters: like weights, shared by all sequences and not part of the cache."""
        return sum(tensor.nbytes for block in self.blocks for tensor in block.tensors().values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex over plan and codecs: what a stored context is tied to.

        Over the tensors themselves and not their file, so that the writer of the file does not matter; over the
        plan's fields that differ from their defaults, so that fields of later versions do not matter either.
        """
        plan = self.plan.model_dump(mode="json", exclude_defaults=True)
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True, separators=(",", ":")).encode())
        for index, block in enumerate(self.blocks):
            for name, tensor in sorted(block.tensors().items()):
                data = tensor.detach().cpu().contiguous()
                digest.update(f"\n{index} {name} {data.dtype} {tuple(data.shape)}\n".encode())
                digest.update(data.numpy().data)
        return digest.hexdigest()

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model that the bundle was not fitted for.

        Raises:
            ModelMismatchError: with what differs.
        """
        geometry = read_geometry(model.config)
        wanted = self.plan.geometry
        if geometry != wanted:
            fields = [f for f in type(wanted).model_fields if getattr(geometry, f) != getattr(wanted, f)]
            differs = ", ".join(f"{f}: {getattr(geometry, f)} instead of {getattr(wanted, f)}" for f in fields)
            raise ModelMismatchError(
                f"this bundle was fitted for {self.model.name} ({self.model.architecture}); the model differs in "
                f"{differs}; use the bundle's model or fit a bundle for this one"
            )
        differs = mismatch(self.fingerprint, fingerprint(model))
        if differs is not None:
            raise ModelMismatchError(
                f"this bundle was fitted for the weights of {self.model.name}, but {differs}; fit a bundle for this model"
            )

    def save(self, folder: str | Path, card: str, overwrite: bool = False) -> Path:
        """Write the bundle whole or not at all.

        Args:
            folder: where to; must not exist unless ``overwrite`` and it is a bundle.
            card: text of its ``README.md``.
            overwrite: replace a bundle that is there.

        Raises:
            BundleError: something else is there, or the place cannot be written to.
        """
        folder = Path(folder)
        check_target(folder, overwrite)
        codecs = self._codecs_bytes()
        manifest = {
            "format_version": FORMAT_VERSION,
            "model": self.model.model_dump(mode="json"),
            "fit": self.fit.model_dump(mode="json"),
            "codecs_sha256": hashlib.sha256(codecs).hexdigest(),
            "plan": json.loads(self.plan.to_json()),
        }
        files = {CODECS_FILE: codecs, PLAN_FILE: (json.dumps(manifest, indent=1) + "\n").encode()}
        _write_folder(folder, files | {CARD_FILE: card.encode()})
        return folder

    def _codecs_bytes(self) -> bytes:
        tensors = {"fingerprint.values": self.fingerprint.values}
        for index, block in enumerate(self.blocks):
            tensors |= {f"blocks.{index}.{name}": t for name, t in block.tensors().items()}
        return save_safetensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})

    @classmethod
    def load(cls, folder: str | Path) -> Bundle:
        """Read and check a bundle.

        Raises:
            BundleError: a file is missing, truncated, tampered with, or does not fit the plan.
            PlanError: the plan is malformed or of an unknown version.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        plan = Plan.from_data(manifest.get("plan"))
        for block in plan.blocks:
            if block.codec not in CODECS:
                raise PlanError(f"the plan uses codec {block.codec!r}; this kvcar has {list(CODECS)}; upgrade kvcar")
        try:
            model = ModelIdentity.model_validate(manifest.get("model"))
            fit = FitProvenance.model_validate(manifest.get("fit"))
        except ValidationError as error:
            raise BundleError(
                f"{folder / PLAN_FILE} is damaged: {error.errors()[0]['msg']}; fit the bundle again"
            ) from None
        tensors = _read_codecs(folder, manifest.get("codecs_sha256"))
        values = tensors.pop("fingerprint.values", None)
        if values is None:
            raise BundleError(f"{folder / CODECS_FILE} lacks the model's fingerprint; fit the bundle again")
        blocks = tuple(
            CodedBlock.from_tensors(_below(tensors, f"blocks.{i}."), block, plan.geometry.head_dim)
            for i, block in enumerate(plan.blocks)
        )
        print_ = Fingerprint(values=values, dtype=model.dtype, digest=model.fingerprint)
        return cls(plan, blocks, print_, model, fit)


def check_target(folder: Path, overwrite: bool) -> None:
    """Make sure, before any work is done, that a bundle can be written to ``folder``; raises BundleError."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not (folder / PLAN_FILE).is_file():
            raise BundleError(f"{folder} exists and is not a bundle; choose another folder")
        if not overwrite:
            raise BundleError(f"{folder} already holds a bundle; choose another folder or ask to overwrite it")
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".kvcar-"):
            pass
    except OSError as error:
        raise BundleError(f"cannot write to {parent}: {error.strerror}; choose a folder you may write to") from None


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
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


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / PLAN_FILE
    if not folder.is_dir():
        raise BundleError(f"there is no bundle at {folder}; 'kvcar fit' writes one")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {PLAN_FILE}") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}; fit the bundle again") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise PlanError(
            f"{path} has plan format version {version!r}; this kvcar reads version {FORMAT_VERSION}; "
            "upgrade kvcar or fit the bundle again"
        )
    return data


def _read_codecs(folder: Path, expected_sha256: object) -> dict[str, Tensor]:
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


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
