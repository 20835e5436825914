"""The weights that a model computes with right now: which adapters are on, and whether anything was written to.

Adapters are told by what peft gives its layers, so that peft need not be there. A parameter that plays no part, of an adapter that is
switched off or merged, is left out, and one of a layer that was wrapped goes by the name it had before: switching all
adapters off gives the model's own weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_WRAPPED = ("base_layer", "original_module")
_REPLACES = "modules_to_save"  # what an adapter has of its own in place of a module


class WeightsInUse(NamedTuple):
    """What a model's output depends on.

    Attributes:
        parameters: by name; each once, where it is shared.
        scales: by name, the factors of the adapters that are on.
    """

    parameters: dict[str, Tensor]
    scales: dict[str, float]


def weights_in_use(model: nn.Module) -> WeightsInUse:
    """Find the parameters and scales that play a part in the model's output."""
    found, seen = WeightsInUse({}, {}), set[int]()
    for name, value in _walk(model, ""):
        if not isinstance(value, Tensor):
            found.scales[name] = value
        elif id(value) not in seen:
            seen.add(id(value))
            found.parameters[name] = value
    return found


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Name the adapters that are on, and those merged into the weights."""
    names = set[str]()
    for module in model.modules():
        if _has_adapters(module):
            names |= set(_active(module)) | {f"{name} (merged)" for name in _merged(module)}
    return tuple(sorted(names))


@torch.no_grad()
def weights_state(model: nn.Module) -> tuple[object, ...]:
    """Take what changes where weights are replaced, written to, or adapters switched; equal states compare equal.

    Costs a millisecond for a few hundred parameters, of which it reads one element each: writing through ``.data``, as
    merging an adapter does, leaves no other trace.
    """
    used = weights_in_use(model)
    places = tuple((name, id(p), p.data_ptr(), p.dtype, _version(p)) for name, p in used.parameters.items())
    return places, tuple(used.scales.items()), active_adapters(model), _elements(used.parameters)


def _walk(module: Any, prefix: str) -> Iterator[tuple[str, Tensor | float]]:
    """Parameters and scales in use by name; one that is shared comes once for each of its names."""
    layers: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    if _has_adapters(module):
        layers, on = type(module).adapter_layer_names, _active(module)
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            yield from ((f"{prefix}scaling.{place}", float(scaling[n])) for place, n in enumerate(on) if n in scaling)
    yield from ((prefix + name, p) for name, p in module._parameters.items() if p is not None)
    for name, child in module._modules.items():
        if child is None or (on and name == "original_module" and _REPLACES in layers):
            continue
        if name in layers:
            yield from _of_adapters(child, on, f"{prefix}{name}.")
        else:
            yield from _walk(child, prefix if layers and name in _WRAPPED else f"{prefix}{name}.")


def _of_adapters(container: Any, on: tuple[str, ...], prefix: str) -> Iterator[tuple[str, Tensor | float]]:
    """What a dictionary of modules or parameters holds of the adapters that are on, by their place and not their name."""
    for place, name in enumerate(on):
        if name not in container:
            continue
        own = container[name]
        if isinstance(own, nn.Module):
            yield from _walk(own, f"{prefix}{place}.")
        else:
            yield f"{prefix}{place}", own


def _has_adapters(module: Any) -> bool:
    names = getattr(type(module), "adapter_layer_names", None)
    return isinstance(names, tuple) and hasattr(module, "active_adapters")


def _merged(module: Any) -> tuple[str, ...]:
    return tuple(getattr(module, "merged_adapters", ()))


def _active(module: Any) -> tuple[str, ...]:
    """Adapters that this module adds as it runs; once merged they are part of its own weights."""
    if getattr(module, "disable_adapters", False) or _merged(module):
        return ()
    return tuple(sorted(module.active_adapters))


def _version(parameter: Tensor) -> int:
    """How often it was written to; tensors made in inference mode do not count."""
    return -1 if parameter.is_inference() else parameter._version


def _elements(parameters: dict[str, Tensor]) -> bytes:
    """One element of each floating-point parameter, fetched together."""
    together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters.values():
        if parameter.is_floating_point() and parameter.numel() and parameter.device.type != "meta":
            element = parameter.detach()[tuple(size // 2 for size in parameter.shape)]
            together.setdefault((parameter.device, parameter.dtype), []).append(element)
    return b"".join(torch.stack(own).float().cpu().numpy().tobytes() for own in together.values())
