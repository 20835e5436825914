"""Running part of a decoder: from a layer on, given what comes out of the layers below it.

Layers are skipped by giving the instances another ``forward`` for a while, which works for every family, since no
argument of theirs needs to be known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..models.structure import find_decoder


class LayerStack:
    """The decoder layers of a model, in order.

    Raises:
        UnsupportedModelError: attention modules do not lie in a list of layers.
    """

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        self._model = model
        names = {id(module): name for name, module in model.named_modules()}
        self.layers = tuple(
            _enclosing_layer(model, names[id(m)], i) for i, m in enumerate(find_decoder(model, layers).attention)
        )
        self._in_tuple = False

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def hidden(self, ids: Tensor, layer: int, start: tuple[int, Tensor] | None = None) -> Tensor:
        """What reaches ``layer``, ``[B, T, hidden]``; ``len(self)`` is what leaves the last one.

        Args:
            ids: windows int64 ``[B, T]``.
            layer: layer whose input is wanted.
            start: (a layer up to ``layer``, what reaches it), so that layers below need not run.
        """
        if start is not None and start[0] == layer:
            return start[1]
        reached: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del module, args
            self._in_tuple = isinstance(output, tuple)
            reached.append(output[0] if self._in_tuple else output)
            raise _Reached

        if layer == 0:
            raise ValueError("nothing runs before the first layer")
        handle = self.layers[layer - 1].register_forward_hook(note)
        try:
            with self.starting_at(*(start or (0, None))):
                self._model(input_ids=ids, use_cache=False)
        except _Reached:
            return reached[0]
        finally:
            handle.remove()
        raise UnsupportedModelError(f"{type(self._model).__name__} does not run its decoder layers one after another")

    @contextmanager
    def starting_at(self, layer: int, hidden: Tensor | None) -> Iterator[None]:
        """Passes inside skip the layers below ``layer`` and feed it ``hidden`` (not needed for layer 0)."""

        def skip(incoming: Tensor, *args: Any, **kwargs: Any) -> Any:
            del incoming, args, kwargs
            return (hidden,) if self._in_tuple else hidden

        skipped = self.layers[:layer]
        for module in skipped:
            module.__dict__["forward"] = skip
        try:
            yield
        finally:
            for module in skipped:
                del module.__dict__["forward"]


class _Reached(Exception):
    """The layer that was asked for has run."""


def _enclosing_layer(model: nn.Module, name: str, index: int) -> nn.Module:
    """The entry of a module list that an attention module lies in: ``model.layers.3`` of ``model.layers.3.self_attn``."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if parts[end - 1] == str(index) and isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return model.get_submodule(".".join(parts[:end]))
    raise UnsupportedModelError(f"{type(model).__name__} keeps attention module {name} outside a list of layers")
