"""What tests of records share: a tiny model's keys and values, and coders of bundles of every kind."""

from dataclasses import replace

import torch
from bundles import SOURCE, by_hand, exact, fitted
from tiny import tiny_model, token_ids
from transformers import DynamicCache

from kvcar.fit.fit import fit_bundles
from kvcar.fit.options import FitOptions
from kvcar.geometry import Slot
from kvcar.models.geometry import geometry_of
from kvcar.models.rotation import learn_rotations
from kvcar.plan import CacheConfig, Reuse
from kvcar.serve.record_coder import RecordCoder
from kvcar.serve.record_file import token_chain

TOKENS = 300


def slots_of(layers, kinds=("key", "value")):
    return tuple(Slot(layer, head, kind) for layer in layers for kind in kinds for head in (0, 1))


def stored(model):
    """A bundle of the profile of stored contexts."""
    options = FitOptions(6, profile="stored", cache=CacheConfig(32, 4, 32), effect_tokens=512)
    return limited(next(fit_bundles(model, token_ids(256, batch=8, seed=7), [options], SOURCE, "tiny")), None)


def limited(bundle, limit):
    """The bundle with another limit to what a page may cost."""
    cache = replace(bundle.plan.cache, max_page_cost=limit)
    return replace(bundle, plan=bundle.plan.model_copy(update={"cache": cache}))


BUNDLES = {
    "stored": stored,
    "fitted": lambda m: fitted(m, times_smaller=4, layers_per_block=2),
    "half-steps": lambda m: fitted(m, codec="linear8", metric="effect", times_smaller=4, layers_per_block=2, trellis=True, max_page_cost=None),
    "lossless": lambda m: fitted(m, codec="identity", layers_per_block=4),
    "nothing-coded": exact,
    "across-layers": lambda m: by_hand(m, [slots_of((0, 2)), slots_of((1, 3))], bits=[7, 5, 3, 1], sinks=0),
    "some-exact": lambda m: by_hand(m, [slots_of((1,), ("key",)), slots_of((3,))], bits=[16, 6, 4]),
    "reuses": lambda m: by_hand(
        m, [slots_of((0, 1))], bits=8, reuses=tuple(Reuse(slot=Slot(2, h, k), source=Slot(1, h, k)) for h in (0, 1) for k in ("key", "value"))
    ),
    "dynamic-scales": lambda m: fitted(m, key_latents=16, value_latents=16, scales="dynamic", latent_bits=5),
    "autoencoder": lambda m: fitted(m, codec="autoencoder", key_latents=16, value_latents=16, steps=5),
}  # fmt: skip


def model_and_sides(family="llama", tokens=TOKENS, dtype=torch.float32, **overrides):
    """A model, ids ``[1, N]``, and its keys (after RoPE) and values ``[L, H, N, D]``."""
    model = tiny_model(family, dtype=dtype, **overrides)
    ids, cache = token_ids(tokens), DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    keys, values = zip(*((layer.keys[0], layer.values[0]) for layer in cache.layers), strict=True)
    return model, ids, torch.stack(keys), torch.stack(values)


def coder_of(model, bundle, dtype=torch.float32):
    return RecordCoder(bundle, learn_rotations(model, geometry_of(model)).get, dtype)


def keys_of(coder, ids, salt=b""):
    return token_chain(ids[0].tolist(), coder.fingerprint, coder.bundle.digest, salt)
