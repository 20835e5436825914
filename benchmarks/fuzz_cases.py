"""Bundles and contexts changed at random, all checksums made anew, and what must come of each. Run by ``fuzz.py``.

A case is drawn from its seed alone. It ends in one of kvcar's own errors, or in a bundle or cache that works: the next
tokens have finite logits and the cache says what it holds.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import zstandard
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from kvcar import Bundle, CacheConfig, FitOptions, KVCarCache, Structure, attach, fit_bundles, read_context
from kvcar.bundle.files import CODECS_FILE, PLAN_FILE, manifest_digest
from kvcar.geometry import Slot
from kvcar.plan import Reuse

VOCABULARY, TOKENS = 64, 90
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_CACHE = CacheConfig(window=32, sinks=4, page_tokens=32)
_REUSE = (
    Reuse(slot=Slot(1, 0, "key"), source=Slot(0, 1, "key")),
    Reuse(slot=Slot(2, 1, "value"), source=Slot(1, 1, "value")),
)
_FINER = "pages beyond their limit"
_STRUCTURES = {
    "linear": Structure(bits=4),
    "blocks over layers": Structure(bits=3, layers_per_block=3),
    "heads apart": Structure(bits=5, heads_per_block=1, reuses=_REUSE),
    "some layers": Structure(bits=4, layers=(1,)),
    "autoencoder": Structure(codec="autoencoder", bits=4, steps=2),
    "dynamic scales": Structure(codec="autoencoder", key_latents=8, value_latents=8, scales="dynamic", steps=2),
    "raw latents": Structure(key_latents=8, value_latents=8, latent_bits=16),
    "decoders in 8 bits": Structure(codec="linear8", metric="effect", bits=4),
    "half steps, mean errors": Structure(codec="linear8", metric="effect", bits=3, page_means=True, trellis=True),
    _FINER: Structure(codec="linear8", metric="effect", bits=3, layers_per_block=3, page_means=True, trellis=True),
    "quantiser": Structure(codec="identity", bits=4.5),
    "lossless": Structure(codec="identity"),
}


def token_ids(count: int, batch: int, seed: int = 0) -> Tensor:
    """Random token ids int64 ``[batch, count]``."""
    return torch.randint(3, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


@cache
def model_of(family: str, use: str = "") -> Any:
    """A tiny random model, one for every use; one family has sliding layers."""
    del use
    torch.manual_seed(0)
    sliding = {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 24,
        "query_pre_attn_scalar": 8,
    }
    config = LlamaConfig(**_SMALL) if family == "llama" else Gemma3TextConfig(**_SMALL, **sliding)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@cache
def attached(family: str) -> Any:
    """A model that is attached for good, with a bundle that loses nothing."""
    model = model_of(family, "attached")
    options = FitOptions(structure=Structure(codec="identity"), cache=_CACHE)
    attach(model, next(fit_bundles(model, torch.zeros(0, 0, dtype=torch.int64), [options], name=family)))
    return model


@torch.no_grad()
def step(model: Any, filled: KVCarCache, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of the next tokens."""
    return model(input_ids=ids, past_key_values=filled, use_cache=True, **inputs).logits


# Files to begin with


@dataclass
class Corpus:
    """Bundles and contexts as they were written, and the models that they belong to."""

    folder: Path
    bundles: list[tuple[str, Path]]
    contexts: list[tuple[str, Path, Bundle]]


def make_corpus(folder: Path) -> Corpus:
    """Fit a bundle of every structure and save contexts with each, in ``folder``."""
    bundles, contexts = [], []
    for family in ("llama", "gemma3"):
        model = model_of(family)
        for name, structure in _STRUCTURES.items():
            if family == "gemma3" and (structure.reuses or structure.layers or structure.layers_per_block > 1):
                continue
            cache = replace(_CACHE, max_page_cost=1e-4) if name == _FINER else _CACHE
            options = FitOptions(structure=structure, cache=cache)
            path = folder / f"{family} {name}"
            if not path.exists():
                bundle = next(fit_bundles(model, token_ids(128, 8, 7), [options], name=family))
                bundle.save_pretrained(path)
            bundle = Bundle.from_pretrained(path)
            bundles.append((family, path))
            for batch, keep_window in ((1, True), (2, False)):
                saved = path.with_name(f"{path.name} {batch}.ctx")
                if not saved.exists():
                    _save_context(model, bundle, saved, batch, keep_window)
                contexts.append((family, saved, bundle))
    return Corpus(folder, bundles, contexts)


def _save_context(model: Any, bundle: Bundle, path: Path, batch: int, keep_window: bool) -> None:
    ids = token_ids(TOKENS, batch)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :7] = 0
    with attach(model, bundle) as attachment:
        filled = attachment.new_cache()
        step(model, filled, ids, attention_mask=mask)
        filled.save(path, keep_window=keep_window, token_ids=ids)


# JSON

_VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 89, 90, 91, 255, 256, 257, 512, 1024, 65536, 2**31 - 1,
    2**31, 2**53, 2**63, 2**64, -(2**70), 10**300, 0.0, -0.0, 0.5, 1.5, 1e308, float("inf"), float("nan"), "", "a", "key",
    "value", "linear", "identity", "autoencoder", "static", "dynamic", "bfloat16", "float16", "float32", "model", "uint8",
    "int32", "zstd", "range", "codes", "exact", "plain.0", "raw.0", "token_ids", "sha256", "__metadata__", "\ud800", "\0",
    "0" * 64, "f" * 64, "9" * 5000, [], [[]], [0], [1], [-5], [90], [0, 0], [0, 0, "key"], [1, 0, "value"], [2, 1, "key"],
    [4000], [2**40], {}, {"bits": 4, "count": 8}, {"bits": 16, "count": 1}, {"name": "codes"},
]  # fmt: skip


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (parent, key) below a JSON value."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


def mutate_json(tree: Any, rng: random.Random) -> None:
    """Change a JSON value in place, in one to three places."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(tree))
        if not places:
            return
        node, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.12:
            del node[key]
        elif kind < 0.2:
            _insert(node, key, rng)
        elif kind < 0.35:
            other, place = rng.choice(places)
            node[key] = json.loads(json.dumps(other[place]))
        elif kind < 0.6 and type(node[key]) is int:
            node[key] += rng.choice([-64, -32, -2, -1, 1, 2, 32, 64])
        elif kind < 0.65 and isinstance(node[key], list):
            rng.shuffle(node[key])
        else:
            node[key] = json.loads(json.dumps(rng.choice(_VALUES)))


def _insert(node: Any, key: Any, rng: random.Random) -> None:
    if isinstance(node, list):
        node.insert(key, json.loads(json.dumps(node[key])))
    else:
        node[rng.choice(["surprise", "layers", "slots", "groups", "scales", "", "\ud800"])] = rng.choice(_VALUES)


def raw_json(tree: Any, rng: random.Random) -> bytes:
    """The text of a JSON value, at times such as no writer makes."""
    text = json.dumps(tree)
    kind = rng.random()
    if kind < 0.9:
        return text.encode()
    place = rng.randrange(len(text))
    odd: list[Callable[[], bytes]] = [
        lambda: text[:place].encode(),
        lambda: (text[:place] + "[" * rng.choice([1, 900, 100_000]) + text[place:]).encode(),
        lambda: (text[:place] + "9" * rng.choice([1, 400, 5000]) + text[place:]).encode(),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: text.encode("utf-16"),
        lambda: text.encode()[:place] + rng.randbytes(3) + text.encode()[place:],
        lambda: b'{"a": ' * 990 + b"1" + b"}" * 990,
        lambda: b"",
    ]
    return rng.choice(odd)()


# Tensors

_EXTREMES = [0.0, -0.0, 1e-45, 1e-38, -1e-30, 1e10, -1e12, 1e20, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]
_DTYPES = [
    torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def mutate_tensor(tensor: Tensor, rng: random.Random) -> Tensor:
    """Another dtype or shape, or other values."""
    draw = torch.Generator().manual_seed(rng.randrange(2**31))
    kind = rng.random()
    if kind < 0.1:
        return tensor.to(rng.choice(_DTYPES))
    if kind < 0.15 and tensor.numel() and tensor.element_size() == 4:
        return tensor.contiguous().view(rng.choice([torch.int32, torch.float32, torch.int8, torch.float16]))
    if kind < 0.35:
        shape = [max(0, n + rng.choice([-1, 0, 0, 1])) for n in tensor.shape]
        shapes: list[list[int]] = [shape, [*shape, 1], shape[1:], shape[::-1], [tensor.numel()], [0, *shape[1:]]]
        return torch.randn(rng.choice(shapes), generator=draw).to(tensor.dtype)
    changed = tensor.clone()
    if not changed.numel():
        return changed
    flat = changed.view(-1)
    if kind < 0.6:
        for _ in range(rng.choice([1, 1, 3])):
            flat[rng.randrange(len(flat))] = _fitting(rng.choice(_EXTREMES), tensor.dtype)
        return changed
    if kind < 0.7:
        return _fitting(rng.choice(_EXTREMES), tensor.dtype).expand(changed.shape).clone()
    if kind < 0.85 and tensor.is_floating_point():
        factor = rng.choice([-1.0, 0.0, 1e-6, 1e3, 1e6, 1e9, 1e15, 1e25])
        # Numbers of 8 bits cannot be multiplied as they are.
        return changed * factor if tensor.element_size() > 1 else (changed.float() * factor).to(tensor.dtype)
    if kind < 0.92:
        return flat[torch.randperm(len(flat), generator=draw)].view(tensor.shape)
    bits = flat.view(torch.uint8)
    bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
    return changed


def _fitting(value: float, dtype: torch.dtype) -> Tensor:
    """The number as the dtype has it."""
    if not dtype.is_floating_point:
        value = max(-100.0, min(100.0, value)) if value == value else 0.0
    return torch.tensor(value, dtype=torch.float64).to(dtype)


# Bundles


def bundle_case(corpus: Corpus, rng: random.Random, scratch: Path) -> str:
    """Change a bundle, load it, and generate over it."""
    family, source = rng.choice(corpus.bundles)
    folder = scratch / "bundle"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    manifest = json.loads((folder / PLAN_FILE).read_text())
    kind = rng.random()
    if kind < 0.5:
        _change_codecs(folder / CODECS_FILE, rng)
        manifest["codecs_sha256"] = hashlib.sha256((folder / CODECS_FILE).read_bytes()).hexdigest()
    elif rng.random() < 0.75:
        mutate_json(manifest["plan"], rng)
    elif rng.random() < 0.5:
        _change_plan(manifest["plan"], rng)
    else:
        mutate_json(manifest, rng)
    if "sha256" in manifest and rng.random() < 0.98:
        manifest["sha256"] = manifest_digest(manifest)
    (folder / PLAN_FILE).write_bytes(raw_json(manifest, rng) if kind >= 0.5 else json.dumps(manifest).encode())
    bundle = Bundle.from_pretrained(folder)
    if rng.random() < 0.1:  # attached with it; otherwise its caches are used with a model that is attached already
        with attach(model_of(family, "of its own"), bundle):
            _generates(model_of(family, "of its own"), bundle)
    else:
        _generates(attached(family), bundle)
    if rng.random() < 0.05:
        again = Bundle.from_pretrained(bundle.save_pretrained(scratch / "again", overwrite=True))
        _expect(again.digest == bundle.digest, "it is saved as another bundle")
    return "works"


def _generates(model: Any, bundle: Bundle) -> None:
    """Prefill in two chunks, and a step."""
    ids = token_ids(TOKENS, 2)
    filled = KVCarCache(bundle)
    for part in ids.split(60, dim=1):
        _expect_finite(step(model, filled, part))
    _expect_finite(step(model, filled, ids[:, :1]))
    _expect_held(filled, TOKENS + 1, 2)


def _change_plan(plan: dict[str, Any], rng: random.Random) -> None:
    """A change of which some parts may well be meant."""
    blocks = plan["blocks"]
    changes: list[Callable[[], Any]] = [
        lambda: plan["cache"].update(window=32 * rng.randrange(9)),
        lambda: plan["cache"].update(sinks=rng.randrange(40)),
        lambda: plan["cache"].update(page_tokens=32 * rng.randint(1, 33), window=rng.choice([0, 32, 64, 1024])),
        lambda: plan.update(exact_dtype=rng.choice(["model", "bfloat16", "float16"])),
        lambda: rng.shuffle(blocks),
        lambda: [rng.shuffle(block["slots"]) for block in blocks],
        lambda: blocks.pop(rng.randrange(len(blocks))),
        lambda: rng.choice(blocks).update(
            groups=[{"bits": rng.randint(1, 16), "count": rng.choice([1, 8, 16, 10**9])}]
        ),
        lambda: rng.choice(blocks).update(scales="dynamic"),
        lambda: rng.choice(blocks).update(codec=rng.choice(["linear", "identity", "autoencoder"])),
        lambda: plan["reuses"].append({"slot": _slot(rng), "source": _slot(rng)}),
        lambda: plan["geometry"].update(
            sliding_layers=[rng.randrange(4)], sliding_window=rng.choice([0, 1, 24, 2**31])
        ),
    ]
    for _ in range(rng.choice([1, 1, 2])):
        if blocks:
            rng.choice(changes)()


def _slot(rng: random.Random) -> list[Any]:
    return [rng.randrange(4), rng.randrange(3), rng.choice(["key", "value"])]


def _change_codecs(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.15:
        data = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 4)):
            data[rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), 600))])] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        return
    tensors = load_file(path)
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(sorted(tensors))
        kind = rng.random()
        if kind < 0.05:
            del tensors[name]
        elif kind < 0.1:
            tensors[rng.choice(["surprise", "blocks.0.surprise", "blocks.77.mean", "blocks.-1.mean", name + "x"])] = (
                tensors[name]
            )
        elif kind < 0.2:
            tensors[name] = tensors[rng.choice(sorted(tensors))].clone()
        else:
            tensors[name] = mutate_tensor(tensors[name], rng)
        if not tensors:
            break
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


# Contexts


def context_case(corpus: Corpus, rng: random.Random, scratch: Path) -> str:
    """Change a stored context, read it, load it, and go on from it."""
    family, source, bundle = rng.choice(corpus.contexts)
    container = Container.of(source.read_bytes())
    _change_context(container, rng)
    path = scratch / "a.ctx"
    path.write_bytes(container.data(rng))
    stored = read_context(path)
    model = attached(family)
    filled = KVCarCache.load(path, model, bundle)
    tokens, batch = stored.header.tokens, len(stored.header.padding)
    _expect_held(filled, tokens, batch)
    mask = torch.ones(batch, tokens + 3, dtype=torch.int64)
    for row, padding in zip(mask, stored.header.padding, strict=True):
        row[:padding] = 0
    _expect_finite(step(model, filled, token_ids(3, batch), attention_mask=mask))
    _expect_held(filled, tokens + 3, batch)
    if rng.random() < 0.1:
        filled.save(scratch / "again.ctx")
        _expect_held(KVCarCache.load(scratch / "again.ctx", model, bundle), tokens + 3, batch)
    return "works"


@dataclass
class Container:
    """A context taken apart: its header, the bytes of every part, and what safetensors says of them if not the truth."""

    header: Any
    payloads: dict[str, bytes]
    entries: dict[str, Any] | None = None

    @classmethod
    def of(cls, data: bytes) -> Container:
        """Take a file apart."""
        start = 8 + int.from_bytes(data[:8], "little")
        fields = json.loads(data[8:start])
        header = json.loads(fields.pop("__metadata__")["kvcar_context"])
        places = {part["name"]: fields[part["name"]]["data_offsets"] for part in header["parts"]}
        return cls(header, {name: data[start + first : start + last] for name, (first, last) in places.items()})

    def laid_out(self) -> dict[str, Any]:
        """What safetensors says of tensors of bytes, one after the other."""
        entries, start = {}, 0
        for name, data in {**self.payloads, "sha256": bytes(32)}.items():
            entries[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [start, start + len(data)]}
            start += len(data)
        return entries

    def data(self, rng: random.Random) -> bytes:
        """Put the file together, its checksum in order."""
        metadata = {"kvcar_context": raw_json(self.header, rng).decode(errors="replace")}
        fields = json.dumps({"__metadata__": metadata, **(self.entries or self.laid_out())}).encode()
        fields += b" " * (-len(fields) % 8)
        body = len(fields).to_bytes(8, "little") + fields + b"".join(self.payloads.values())
        return body + hashlib.sha256(body).digest()

    def replace(self, part: dict[str, Any], tensor: Tensor) -> None:
        """Put a tensor into a part that zstandard holds, with its own SHA-256."""
        raw = tensor.contiguous().view(-1).view(torch.uint8).reshape(-1, tensor.element_size())
        dtype = str(tensor.dtype).removeprefix("torch.")
        part.update(shape=list(tensor.shape), dtype=dtype, sha256=hashlib.sha256(raw.numpy().tobytes()).hexdigest())
        self.payloads[part["name"]] = zstandard.ZstdCompressor().compress(raw.T.contiguous().numpy().tobytes())

    def tensor(self, part: dict[str, Any]) -> Tensor:
        """The tensor of such a part."""
        dtype = getattr(torch, part["dtype"])
        raw = bytearray(zstandard.ZstdDecompressor().decompress(self.payloads[part["name"]]))
        planes = torch.frombuffer(raw, dtype=torch.uint8).view(dtype.itemsize, -1)
        return planes.T.contiguous().view(dtype).view(part["shape"])


def _change_context(container: Container, rng: random.Random) -> None:
    header, kind = container.header, rng.random()
    if kind < 0.15:
        name = rng.choice(sorted(container.payloads))
        data = bytearray(container.payloads[name])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        container.payloads[name] = bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
    elif kind < 0.4:
        part = rng.choice([part for part in header["parts"] if part["coding"] == "zstd"])
        changed = mutate_tensor(container.tensor(part), rng)
        if changed.numel():
            container.replace(part, changed)
    elif kind < 0.55:
        header.update(
            padding=[rng.randint(0, TOKENS + 5) for _ in header["padding"]],
            offset=[rng.randint(-200, TOKENS + 5) for _ in header["offset"]],
        )
    elif kind < 0.65:
        header.update(
            {rng.choice(["tokens", "paged", "window"]): rng.choice([0, 1, 31, 32, 63, 64, 89, 90, 91, 96, 2**31 - 1])}
        )
    elif kind < 0.75:
        container.entries = container.laid_out()
        mutate_json(container.entries, rng)
    else:
        mutate_json(header, rng)


# What must be


class WrongResultError(Exception):
    """A file that was taken and does not work."""


def _expect(right: bool, otherwise: str) -> None:
    if not right:
        raise WrongResultError(otherwise)


def _expect_held(filled: KVCarCache, tokens: int, batch: int) -> None:
    got = (filled.tokens, filled.batch_size, filled.get_seq_length())
    _expect(got == (tokens, batch, tokens), f"a cache of {tokens} tokens of {batch} sequences says {got}")


def _expect_finite(logits: Tensor) -> None:
    _expect(bool(logits.isfinite().all()), "logits are not finite")


CASES = {"bundle": bundle_case, "context": context_case}
