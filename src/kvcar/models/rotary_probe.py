"""Finding out how a model rotates its keys, from what its rotary module computes rather than from its family.

A forward hook on rotary modules notes which call made which (cos, sin); the attention module's pre-hook then sees
the same tensors. From the call, the module's own ``inv_freq`` buffer is found and checked against what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedModelError
from ..kernels.rotary import RotaryStyle, RotaryTable
from .uncompiled import uncompiled

_PROBE_POSITIONS = (0, 1, 100)
_TOLERANCE = 1e-4


class RotaryProbe:
    """Watches the rotary modules below ``root`` and makes a ``RotaryTable`` for each kind of call.

    Attributes:
        listening: set it to False to let calls pass.
    """

    def __init__(self, root: nn.Module) -> None:
        self.listening = True
        self._calls: dict[int, tuple[Tensor, nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
        self._tables: dict[tuple[int, str], RotaryTable] = {}
        self.handles: list[RemovableHandle] = [
            module.register_forward_hook(self._note, with_kwargs=True)
            for module in root.modules()
            if "rotary" in type(module).__name__.lower()
        ]

    @property
    def tables(self) -> tuple[RotaryTable, ...]:
        """All tables made so far."""
        return tuple(self._tables.values())

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if self.listening:
            self._take_note(module, args, kwargs, output)

    @uncompiled
    def _take_note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor):
            # Only what says which rotation it is: the hidden states and positions are not held on to.
            extra = tuple(a for a in args if isinstance(a, str))
            named = {k: v for k, v in kwargs.items() if isinstance(v, str)}
            # Holding the tensor keeps its id from being given to another one.
            self._calls[id(output[0])] = (output[0], module, extra, named)

    def forget(self) -> None:
        """Let go of the calls of a pass that is over."""
        self._calls.clear()

    def table(self, position_embeddings: object) -> RotaryTable:
        """The table behind the (cos, sin) that an attention module was given.

        Raises:
            UnsupportedModelError: the pair did not come from a rotary module whose angles are position times a
                fixed frequency.
        """
        if not isinstance(position_embeddings, tuple) or not isinstance(position_embeddings[0], Tensor):
            raise UnsupportedModelError(
                f"attention got position embeddings of type {type(position_embeddings).__name__}, not the (cos, sin) "
                "pair that kvcar needs to code keys before RoPE"
            )
        call = self._calls.get(id(position_embeddings[0]))
        if call is None:
            raise UnsupportedModelError(
                "attention's (cos, sin) came from no rotary module, so keys cannot be rotated back"
            )
        _, module, extra, named = call
        key = (id(module), repr((extra, named)))
        if key not in self._tables:
            self._tables[key] = _identify(module, extra, named)
        return self._tables[key]


def _identify(module: nn.Module, extra: tuple[Any, ...], named: Mapping[str, Any]) -> RotaryTable:
    buffers = {n: b for n, b in module.named_buffers() if "inv_freq" in n and "original" not in n}
    if not buffers:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no inverse frequencies, so keys cannot be rotated back"
        )
    device = next(iter(buffers.values())).device
    positions = torch.tensor([_PROBE_POSITIONS], device=device)
    # `forward` itself, so that the probing call does not come back through the hook.
    cos, sin = module.forward(torch.zeros(1, device=device), positions, *extra, **named)
    style, cos, sin = _split_pairs(cos[0].double(), sin[0].double(), type(module).__name__)
    scale = float(cos[0, 0])
    for buffer in buffers.values():
        frequency = buffer.double()
        if frequency.shape != cos.shape[1:]:
            continue
        angles = positions[0, :, None] * frequency
        if torch.allclose(angles.cos() * scale, cos, atol=_TOLERANCE) and torch.allclose(
            angles.sin() * scale, sin, atol=_TOLERANCE
        ):
            return RotaryTable(frequency, scale, style)
    raise UnsupportedModelError(
        f"{type(module).__name__} does not rotate by position times a fixed frequency, so stored keys cannot be "
        "rotated back"
    )


def _split_pairs(cos: Tensor, sin: Tensor, name: str) -> tuple[RotaryStyle, Tensor, Tensor]:
    """The pairing of elements that repeated angles show, and the angles once each ``[positions, F]``."""
    half = cos.shape[-1] // 2
    if torch.equal(cos[:, :half], cos[:, half:]):
        return "half", cos[:, :half], sin[:, :half]
    if torch.equal(cos[:, 0::2], cos[:, 1::2]):
        return "interleaved", cos[:, 0::2], sin[:, 0::2]
    raise UnsupportedModelError(f"{name} pairs the elements of a head in a way that kvcar does not know")
