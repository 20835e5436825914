"""What tests of stored contexts share: filled caches, and the container of ``docs/format.md`` written down once more.

A test takes a context apart, changes it, and puts it together with its checksums in order.
"""

import hashlib
import json
from dataclasses import dataclass

import torch
import zstandard

from kvcar.cache.cache import KVCarCache


@torch.no_grad()
def step(model, cache, ids, **inputs):
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).logits


def filled(model, bundle, ids, window=None, **inputs):
    cache = KVCarCache(bundle, window)
    step(model, cache, ids, **inputs)
    return cache


@dataclass
class Container:
    """Header, the bytes of every part, and what safetensors says of them where that is not simply the truth."""

    header: dict
    payloads: dict
    entries: dict | None = None

    def replace(self, name, tensor, **spec):
        """Put another tensor into a part that zstandard holds, its own SHA-256 in order."""
        data = tensor.contiguous().view(torch.uint8).reshape(-1, tensor.element_size())
        part = next(part for part in self.header["parts"] if part["name"] == name)
        part.update(shape=list(tensor.shape), sha256=hashlib.sha256(data.numpy().tobytes()).hexdigest(), **spec)
        self.payloads[name] = zstandard.ZstdCompressor().compress(data.T.contiguous().numpy().tobytes())


def laid_out(payloads):
    entries, start = {}, 0
    for name, data in {**payloads, "sha256": bytes(32)}.items():
        entries[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [start, start + len(data)]}
        start += len(data)
    return entries


def take_apart(data):
    size = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + size])
    header = json.loads(fields.pop("__metadata__")["kvcar_context"])
    payloads = {}
    for part in header["parts"]:
        start, stop = fields[part["name"]]["data_offsets"]
        payloads[part["name"]] = data[8 + size + start : 8 + size + stop]
    return Container(header, payloads)


def put_together(container):
    entries = laid_out(container.payloads) if container.entries is None else container.entries
    metadata = {"kvcar_context": json.dumps(container.header, separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    body = len(text).to_bytes(8, "little") + text + b"".join(container.payloads.values())
    return body + hashlib.sha256(body).digest()
