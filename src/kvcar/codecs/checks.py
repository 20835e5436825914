"""Checks that every codec makes on the tensors of a bundle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import BundleError


def take(tensors: Mapping[str, Tensor], name: str, *shape: int) -> Tensor:
    """The float32 tensor ``name`` with exactly ``shape``, all finite.

    Raises:
        BundleError: it is missing, has another shape or dtype, or holds NaN or infinity.
    """
    if name not in tensors:
        raise BundleError(f"the codec lacks its tensor {name!r}; it has {sorted(tensors)}; fit the bundle again")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise BundleError(f"codec tensor {name!r} has shape {tuple(tensor.shape)}, but the plan needs {shape}")
    if tensor.dtype != torch.float32:
        raise BundleError(f"codec tensor {name!r} is {tensor.dtype}, but the format has float32")
    if not torch.isfinite(tensor).all():
        raise BundleError(f"codec tensor {name!r} holds NaN or infinity; the bundle is damaged, fit it again")
    return tensor
