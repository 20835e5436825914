"""Stored contexts: a cache written to one file, entropy-coded, and read back so that generation goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle
from ..cache.attach import attachment_of
from ..cache.cache import CONTEXT_STORE, KVCarCache
from ..cache.coder import PageCoder
from ..cache.snapshot import CacheContents, cache_of, contents_of
from ..errors import AttachError, CacheStateError, ContextError, InputError, require
from ..models.structure import find_decoder, model_of
from ..version import __version__
from .entropy import store_library
from .file import ContextHeader, Part, PartSpec, read_file, write_file
from .parts import (
    TOKEN_IDS,
    code_bits,
    contents_of_parts,
    decode_part,
    encode_part,
    finer_header,
    is_sound,
    specs_of,
    tensors_of,
)


@dataclass(frozen=True)
class StoredContext:
    """What a file says about the context that it holds.

    Attributes:
        header: model, bundle, tokens, padding and the tensors.
        token_ids: the tokens, int64 ``[B, tokens]``, padding included; None where they were not stored.
        stored_bytes: of the whole file.
    """

    header: ContextHeader
    token_ids: Tensor | None
    stored_bytes: int


def check_store() -> None:
    """Make sure, before any work is done, that the extra ``store`` is installed; raises InputError."""
    for name in ("constriction", "zstandard"):
        store_library(name)


@CONTEXT_STORE.register("save")
def save_context(
    cache: KVCarCache, path: str | Path, keep_window: bool = False, token_ids: Tensor | None = None
) -> None:
    """Write everything that a cache holds to one file, entropy-coded; the cache itself stays as it is.

    A file that is there is replaced; an interruption leaves no half file.

    Args:
        cache: between two passes, and holding tokens.
        path: the file.
        keep_window: store the window exactly, which takes far more bytes per token. By default its tokens go through
            the codec first, on a copy, as ``KVCarCache.flush_window`` does.
        token_ids: the tokens, int64 ``[B, tokens]``, padding included; stored for whoever wants to check or compute
            the context again, ``load_context`` does not need them.

    Raises:
        CacheStateError: the cache holds no tokens, or NaN, infinite values or tokens at negative positions.
        InputError: token ids that are not those of the cache, or the extra ``store`` is not installed.
        ContextError: the file cannot be written.
    """
    require(str, Path, path=path)
    contents = contents_of(cache, keep_window)
    if token_ids is not None:
        _check_token_ids(token_ids, len(contents.padding), contents.tokens)
    tensors, bits = tensors_of(contents, token_ids), code_bits(cache.plan)
    bad = [name for name, tensor in tensors.items() if not is_sound(tensor, name)]
    if bad:
        raise CacheStateError(
            f"{', '.join(bad)} of the cache hold NaN, infinite values or numbers beyond 2^30; reset the cache"
        )
    parts = [encode_part(name, tensor, bits) for name, tensor in tensors.items()]
    write_file(Path(path), _header_of(cache, contents, [part for part, _ in parts]), [data for _, data in parts])


@CONTEXT_STORE.register("load")
def load_context(
    path: str | Path,
    model: PreTrainedModel,
    bundle: Bundle | str | Path | None = None,
    window: int | None = None,
) -> KVCarCache:
    """Read a cache that ``save_context`` wrote; its codes are those that were saved, bit for bit.

    Args:
        path: the file.
        model: the model that the context was computed with; attach it before or after.
        bundle: the bundle that it was saved with, or its folder; None takes the one ``model`` is attached with.
        window: of the tokens to come, see ``KVCarCache``; None takes the saved cache's.

    Raises:
        ContextError: there is no such file, it is damaged or of another version, or it was saved with another bundle or
            another exact dtype.
        ModelMismatchError: the bundle was fitted for another model.
        AttachError: no bundle is given and the model is not attached.
        InputError: as for ``KVCarCache``, or the extra ``store`` is not installed.
    """
    require(str, Path, path=path)
    path, model = Path(path), model_of(model, "load")
    header, data = read_file(path)
    bundle, coder = _made_ready(path, header, model, bundle)
    _check_bounds(path, header, coder)
    parts = {part.name: part for part in header.parts if part.name != TOKEN_IDS}
    wanted = specs_of(coder, model.dtype, header)
    _check_parts(path, {name: part.spec for name, part in parts.items()}, wanted)
    bits = code_bits(coder.plan)
    tensors = {name: _decoded(path, part, data[name], bits) for name, part in parts.items()}
    contents = contents_of_parts(header, tensors, coder)
    return cache_of(contents, bundle, coder, header.window if window is None else window)


def read_context(path: str | Path) -> StoredContext:
    """Read what a stored context is; needs neither its model nor its bundle.

    Raises:
        ContextError: there is no such file, it is damaged or of another version.
        InputError: the extra ``store`` is not installed.
    """
    require(str, Path, path=path)
    path = Path(path)
    header, data = read_file(path)
    part = next((part for part in header.parts if part.name == TOKEN_IDS), None)
    ids = None if part is None else _token_ids(path, header, part, data[TOKEN_IDS])
    return StoredContext(header, ids, path.stat().st_size)


def _header_of(cache: KVCarCache, contents: CacheContents, parts: Sequence[Part]) -> ContextHeader:
    try:
        return ContextHeader(
            kvcar_version=__version__,
            model=cache.bundle.model,
            bundle_sha256=cache.bundle.digest,
            window=cache.plan.window,
            tokens=contents.tokens,
            paged=contents.paged,
            padding=tuple(contents.padding.tolist()),
            offset=tuple(contents.offset.tolist()),
            finer=finer_header(contents.finer),
            parts=tuple(parts),
        )
    except ValidationError as error:
        raise CacheStateError(
            f"this cache cannot be stored: {error.errors(include_input=False)[0]['msg']}; reset the cache"
        ) from None


def _made_ready(
    path: Path, header: ContextHeader, model: PreTrainedModel, bundle: Bundle | str | Path | None
) -> tuple[Bundle, PageCoder]:
    """Check bundle, context and model against each other; return the bundle and its coder, the attached model's if equal."""
    attachment = attachment_of(model)
    if bundle is None:
        if attachment is None:
            raise AttachError(
                "the model is not attached, so its bundle is not known; call kvcar.attach(model, bundle) first, or give "
                "the bundle to load"
            )
        bundle = attachment.bundle
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.from_pretrained(bundle)
    if bundle.digest != header.bundle_sha256:
        raise ContextError(
            f"{path} was saved with another bundle (for {header.model.name[:80]}, SHA-256 {header.bundle_sha256[:12]}...) "
            f"than this one (for {bundle.model.name}, {bundle.digest[:12]}...); give the bundle that it was saved with"
        )
    if attachment is None:
        bundle.check_model(model)
        device = find_decoder(model).device
        return bundle, PageCoder(bundle, device, model.dtype)
    # Equal bundles need not be made ready twice.
    bundle = attachment.bundle if attachment.bundle.digest == bundle.digest else bundle
    attachment.check_weights()
    attachment.check_bundle(bundle)
    return bundle, attachment.coder(bundle)


def _check_bounds(path: Path, header: ContextHeader, coder: PageCoder) -> None:
    """Refuse what no cache of this bundle can hold, however its parts fit together."""
    plan = coder.plan
    wrong = None
    if header.positions > plan.geometry.max_positions:
        wrong = f"ends at position {header.positions}, but the model has {plan.geometry.max_positions} positions"
    elif header.window % plan.page_tokens:
        wrong = f"has a window of {header.window} tokens, which is no multiple of the page size of {plan.page_tokens}"
    elif header.paged and not plan.coded_layers:
        wrong = f"holds {header.paged} coded tokens, but its bundle codes none"
    elif any(
        finer.page * plan.page_tokens >= header.paged or max(finer.shown) > plan.page_tokens for finer in header.finer
    ):
        wrong = f"has finer pages beyond its {header.paged} coded tokens, or of more than {plan.page_tokens} tokens"
    if wrong is not None:
        raise ContextError(f"{path} {wrong}; save the context again")


def _check_parts(path: Path, found: Mapping[str, PartSpec], wanted: Mapping[str, PartSpec]) -> None:
    """Refuse a context whose tensors are not those that this model and bundle would hold."""
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if differing:
        raise ContextError(
            f"{path} holds {_listed(found, differing)} where this model needs {_listed(wanted, differing)}; load the "
            "model with the dtype that the context was computed with, or save it again"
        )


def _listed(specs: Mapping[str, PartSpec], names: Sequence[str]) -> str:
    parts = [specs[name] for name in names if name in specs]
    return ", ".join(f"{part.name} ({part.dtype} {list(part.shape)})" for part in parts) or "nothing"


def _decoded(path: Path, part: Part, data: memoryview, bits: Sequence[int]) -> Tensor:
    tensor = decode_part(part, data, bits)
    if not is_sound(tensor, part.name):
        raise ContextError(
            f"{path} holds NaN, infinite values or numbers beyond 2^30 in {part.name}; save the context again"
        )
    return tensor


def _check_token_ids(ids: Tensor, batch: int, tokens: int) -> None:
    require(Tensor, token_ids=ids)
    if tuple(ids.shape) != (batch, tokens):
        raise InputError(
            f"token_ids has shape {tuple(ids.shape)}, but the cache holds {tokens} tokens of each of {batch} sequences; "
            f"give ({batch}, {tokens}), padding included"
        )
    if ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) > torch.iinfo(torch.int32).max:
        raise InputError(f"token_ids are {ids.dtype} from {ids.min()} to {ids.max()}; give the ids of the tokenizer")


def _token_ids(path: Path, header: ContextHeader, part: Part, data: memoryview) -> Tensor:
    shape = (len(header.padding), header.tokens)
    if (part.coding, part.dtype, part.shape) != ("zstd", "int32", shape):
        raise ContextError(
            f"{path} holds token ids as {part.dtype} {list(part.shape)} instead of int32 {list(shape)}; save the context "
            "again"
        )
    ids = decode_part(part, data, ()).long()
    if int(ids.min()) < 0:
        raise ContextError(f"{path} holds negative token ids; save the context again")
    return ids
