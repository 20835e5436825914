"""The tensors that a codec or quantiser stores, as data, and the check of a bundle's tensors against it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BundleError

# Far beyond what any fit gives, and small enough that no product of a few of them overflows.
LARGEST = 2.0**30


class Stored(NamedTuple):
    """One tensor as a codec stores it.

    Attributes:
        shape: a letter for each axis; equal letters are equal sizes, see ``checked``.
        dtype: exactly this one.
        optional: whether it may be missing.
    """

    shape: str
    dtype: torch.dtype = torch.float32
    optional: bool = False


def checked(tensors: Mapping[str, Tensor], wanted: Mapping[str, Stored], **sizes: int) -> dict[str, Tensor]:
    """Give back ``tensors``, which must be those that are wanted, no more and no less.

    Args:
        tensors: of a bundle, by name.
        wanted: what they must be.
        sizes: known letters of shapes; any other stands for the size that it is first met with.

    Raises:
        BundleError: one is missing or unknown, has another shape or dtype, or holds NaN, infinity or numbers beyond all reason.
    """
    missing = [name for name, stored in wanted.items() if name not in tensors and not stored.optional]
    if missing:
        raise BundleError(
            f"the codec lacks its tensor {missing[0]!r}; it has {sorted(tensors)[:9]}; fit the bundle again"
        )
    unknown = sorted(tensors.keys() - wanted.keys())
    if unknown:
        raise BundleError(
            f"the codec has a tensor {unknown[0][:80]!r}, which is not one of {list(wanted)}; fit the bundle again"
        )
    for name, stored in wanted.items():
        if name in tensors:
            _check(name, tensors[name], stored, sizes)
    return dict(tensors)


def _check(name: str, tensor: Tensor, stored: Stored, sizes: dict[str, int]) -> None:
    got = tuple(tensor.shape)
    if len(got) == len(stored.shape):
        sizes |= {letter: size for letter, size in zip(stored.shape, got, strict=True) if letter not in sizes}
    shape = tuple(sizes.get(letter, letter) for letter in stored.shape)
    if got != shape:
        raise BundleError(f"codec tensor {name!r} has shape {got}, but the plan needs {shape}")
    if tensor.dtype != stored.dtype:
        expected = str(stored.dtype).removeprefix("torch.")
        raise BundleError(f"codec tensor {name!r} is {tensor.dtype}, but the format has {expected}")
    if not tensor.is_floating_point():
        return
    if not torch.isfinite(tensor).all():
        raise BundleError(f"codec tensor {name!r} holds NaN or infinity; the bundle is damaged, fit it again")
    if tensor.numel() and tensor.abs().max().item() > LARGEST:
        raise BundleError(
            f"codec tensor {name!r} holds {tensor.abs().max():g}, and no fit gives more than {LARGEST:g}; the bundle is "
            "damaged, fit it again"
        )
