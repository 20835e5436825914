"""Stored contexts: a cache written to one file, entropy-coded, and read back so that generation goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle
from ..errors import AttachError, ContextError, InputError
from ..models.structure import find_decoder
from ..version import __version__
from ..cache.attach import attachment_of
from ..cache.cache import KVCarCache
from ..cache.coder import PageCoder
from .file import ContextHeader, PartSpec, read_file, write_file
from .parts import TOKEN_IDS, code_bits, contents_of_parts, decode_part, encode_part, specs_of, tensors_of
from ..cache.snapshot import cache_of, contents_of


@dataclass(frozen=True)
class StoredContext:
    """What a file says about the context that it holds.

    Attributes:
        header: model, bundle, tokens, padding and the bytes of each part.
        token_ids: the tokens held, int64 ``[B, tokens]``, padding included; None where they were not stored.
        stored_bytes: of the whole file.
    """

    header: ContextHeader
    token_ids: Tensor | None
    stored_bytes: int


def read_context(path: str | Path) -> StoredContext:
    """What a stored context is; needs neither its model nor its bundle.

    Raises:
        ContextError: there is no such file, it is damaged or of an unknown version.
        InputError: the extra ``store`` is not installed.
    """
    header, data = read_file(Path(path))
    ids = next((decode_part(part, data[TOKEN_IDS], ()) for part in header.parts if part.name == TOKEN_IDS), None)
    return StoredContext(header, None if ids is None else ids.long(), Path(path).stat().st_size)


def save_context(cache: KVCarCache, path: Path, keep_window: bool, token_ids: Tensor | None) -> None:
    """See ``KVCarCache.save``."""
    contents = contents_of(cache, keep_window)
    padding, offset = contents.padding.tolist(), contents.offset.tolist()
    if token_ids is not None and tuple(token_ids.shape) != (len(padding), contents.tokens):
        raise InputError(
            f"token_ids has shape {tuple(token_ids.shape)}, but the cache holds {contents.tokens} tokens of each of "
            f"{len(padding)} sequences; give ({len(padding)}, {contents.tokens}), padding included"
        )
    bits = code_bits(cache.plan)
    parts = [encode_part(name, tensor, bits) for name, tensor in tensors_of(contents, token_ids).items()]
    header = ContextHeader(
        kvcar_version=__version__,
        model=cache.bundle.model,
        bundle_sha256=cache.bundle.digest,
        window=cache.plan.window,
        tokens=contents.tokens,
        paged=contents.paged,
        padding=tuple(padding),
        offset=tuple(offset),
        parts=tuple(part for part, _ in parts),
    )
    write_file(path, header, [data for _, data in parts])


def load_context(
    path: Path,
    model: PreTrainedModel,
    bundle: Bundle | str | Path | None,
    window: int | None,
) -> KVCarCache:
    """See ``KVCarCache.load``."""
    header, data = read_file(path)
    bundle, coder = _made_ready(path, header, model, bundle)
    parts = [part for part in header.parts if part.name != TOKEN_IDS]
    wanted = specs_of(coder, model.dtype, len(header.padding), header.tokens, header.paged)
    _check_parts(path, {part.name: part.spec for part in parts}, wanted)
    bits = code_bits(coder.plan)
    tensors = {part.name: decode_part(part, data[part.name], bits) for part in parts}
    contents = contents_of_parts(header, tensors, coder)
    return cache_of(contents, bundle, coder, header.window if window is None else window)


def _made_ready(
    path: Path, header: ContextHeader, model: PreTrainedModel, bundle: Bundle | str | Path | None
) -> tuple[Bundle, PageCoder]:
    """The bundle, checked against context and model, and its coder; the attached model's own where they are the same."""
    attachment = attachment_of(model)
    if bundle is None:
        if attachment is None:
            raise AttachError(
                "the model is not attached, so its bundle is not known; call kvcar.attach(model, bundle) first, or give "
                "the bundle to load"
            )
        bundle = attachment.bundle
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    if bundle.digest != header.bundle_sha256:
        raise ContextError(
            f"{path} was saved with another bundle (for {header.model.name}, SHA-256 {header.bundle_sha256[:12]}...) "
            f"than this one (for {bundle.model.name}, {bundle.digest[:12]}...); give the bundle that it was saved with"
        )
    if attachment is None:
        bundle.check_model(model)
        device = find_decoder(model, bundle.plan.geometry.layers).device
        return bundle, PageCoder(bundle, device, model.dtype)
    # Equal bundles need not be made ready twice.
    bundle = attachment.bundle if attachment.bundle.digest == bundle.digest else bundle
    attachment.check_bundle(bundle)
    return bundle, attachment.coder(bundle)


def _check_parts(path: Path, found: Mapping[str, PartSpec], wanted: Mapping[str, PartSpec]) -> None:
    """Refuse a context whose tensors are not those that this model and bundle would hold."""
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if differing:
        raise ContextError(
            f"{path} holds {_told(found, differing)} where this model needs {_told(wanted, differing)}; load the model "
            "with the dtype that the context was computed with, or save it again"
        )


def _told(specs: Mapping[str, PartSpec], names: Sequence[str]) -> str:
    parts = [specs[name] for name in names if name in specs]
    return ", ".join(f"{part.name} ({part.dtype} {list(part.shape)})" for part in parts) or "nothing"
