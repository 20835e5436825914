"""Recognising a model by a few hundred of the weights it computes with, in whatever dtype it is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .weights import active_adapters, weights_in_use

_SAMPLES = 512
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
_MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@dataclass(frozen=True)
class Fingerprint:
    """Sampled weights of a model.

    Attributes:
        values: float32 ``[n]``, in a fixed order.
        dtype: what the model's weights were stored as, without the ``torch.`` prefix.
        digest: SHA-256 in hex over names, shapes, places and values.
        adapters: names of the adapters that are on, of a model that has some; no part of what is compared, as their
            weights are.
    """

    values: Tensor
    dtype: str
    digest: str
    adapters: tuple[str, ...] = ()


@torch.no_grad()
def fingerprint(model: nn.Module) -> Fingerprint:
    """Sample a model's parameters in use at fixed places, a few of each, and the scales of its adapters.

    Integers are looked at where they are part of a quantised weight.

    Raises:
        UnsupportedModelError: the weights are not loaded (meta device) or none is a floating-point number.
    """
    used = weights_in_use(model, offloaded=True)
    chosen = (n for n, p in used.parameters.items() if p.numel() and (p.is_floating_point() or n in used.inner))
    parameters = [(name, used.parameters[name]) for name in sorted(chosen)]
    floating = [parameter.dtype for _, parameter in parameters if parameter.is_floating_point()]
    if not floating:
        raise UnsupportedModelError(f"{type(model).__name__} has no floating-point weights to recognise it by")
    digest = hashlib.sha256()
    values = []
    each = max(1, -(-_SAMPLES // len(parameters)))
    for name, parameter in parameters:
        if parameter.device.type == "meta":
            raise UnsupportedModelError(f"the weight {name} is not loaded (meta device); load the model first")
        places = sampled_places(parameter.numel(), each)
        sample = parameter.flatten()[places.to(parameter.device)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {places.tolist()}".encode())
        digest.update(sample.numpy().tobytes())
        values.append(sample)
    for name, scale in sorted(used.scales.items()):
        digest.update(f"{name} {scale!r}".encode())
        values.append(torch.tensor([scale], dtype=torch.float32))
    dtype = str(floating[0]).removeprefix("torch.")
    return Fingerprint(torch.cat(values), dtype, digest.hexdigest(), active_adapters(model))


def sampled_places(elements: int, count: int) -> Tensor:
    """Where ``count`` of a flat tensor's elements are sampled, int64, by a step that shares no pattern with its rows."""
    return (torch.arange(count, dtype=torch.int64) * 7919 + 17) % elements


def mismatch(bundle: Fingerprint, model: Fingerprint) -> str | None:
    """What tells the model's weights from the bundle's, as a clause; None when they are the same weights.

    Weights loaded in another dtype are the same if rounding both to the coarser one makes them equal; bfloat16 and
    float16, of which neither holds the other, may differ by one step of bfloat16.
    """
    adapters = f" (adapters that are on: {', '.join(model.adapters)})" if model.adapters else ""
    if len(bundle.values) != len(model.values):
        return f"the model has {len(model.values)} sampled weights where the bundle has {len(bundle.values)}{adapters}"
    first, second = _DTYPES.get(bundle.dtype), _DTYPES.get(model.dtype)
    if first is None or second is None:
        return f"the dtypes {bundle.dtype[:40]} and {model.dtype} cannot be compared"
    pair = {first, second}
    if pair == {torch.float16, torch.bfloat16}:
        # float16 goes no lower than 6e-8, where bfloat16 goes on.
        same = torch.isclose(bundle.values, model.values, rtol=2.0**-7, atol=6e-8)
    else:
        coarse = min(pair, key=lambda dtype: _MANTISSA_BITS[dtype])
        same = bundle.values.to(coarse) == model.values.to(coarse)
    wrong = int((~same).sum())
    if not wrong:
        return None
    return f"{wrong} of {len(same)} sampled weights differ (bundle in {bundle.dtype}, model in {model.dtype}){adapters}"
